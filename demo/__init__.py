import core.ending  # before everything else: signals during the imports of a stage  # noqa: F401

"""What every stage shares: the runtime (ranks and devices), artifacts on disk, and the command line."""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

# OpenMP reads it when PyTorch is loaded, so it is set before. Its threads wait for one another by spinning, for milliseconds:
# where another program has the core that the awaited thread needs, they spin in its way. So many rounds take about as long as
# sleeping and being woken would.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def lazy_exports(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562) that exports `names`, listed by their module.

    A module is imported when one of its names is first used, so importing the package costs nothing.
    """
    module_of = {name: module for module, listed in names.items() for name in listed}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(module_of[name]), name)

    return get, lambda: sorted(module_of)

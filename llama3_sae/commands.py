"""The console script: `llama3-sae` lists all stages, `llama3-sae STAGE --flag value` runs one.

Nothing heavy is imported before a stage is chosen.
"""

import difflib
import runpy
import sys
from itertools import groupby

from core.version import VERSION
from llama3_sae.stages import STAGES, Stage

USAGE = """\
usage: llama3-sae STAGE [--flag value ...]

From raw text to a steered Llama: mechanistic interpretability with sparse autoencoders.
"""
MORE = """
`llama3-sae STAGE --help` explains the flags of a stage. `python -m PACKAGE.STAGE` runs the same,
`torchrun --nproc_per_node=8 -m PACKAGE.STAGE` on eight GPUs.
"""


def main() -> None:
    """Run the stage that the first argument names, with the arguments after it; without any, list the stages."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(listing(), end="")
    elif name == "--version":
        print(f"llama3-sae {VERSION}")
    else:
        try:
            stage = find(name)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        sys.argv[1:] = rest
        runpy.run_module(stage.module, run_name="__main__", alter_sys=True)


def find(name: str) -> Stage:
    """The stage called `name`, with or without its package, with hyphens or underscores. ValueError where there is none."""
    wanted = name.replace("-", "_")
    found = [stage for stage in STAGES if wanted in (stage.name, stage.module)]
    if not found:
        near = difflib.get_close_matches(wanted, [stage.name for stage in STAGES], 1)
        meant = f"; did you mean {near[0]}?" if near else ";"
        raise ValueError(f"no stage is called {name!r}{meant} `llama3-sae --help` lists all")
    if len(found) > 1:
        raise ValueError(f"{name!r} may be {' or '.join(stage.module for stage in found)}; give the full name")
    return found[0]


def listing() -> str:
    """Usage, and each stage with what it does, by package."""
    width = max(len(stage.name) for stage in STAGES)
    lines = [USAGE]
    for package, stages in groupby(STAGES, lambda stage: stage.module.partition(".")[0]):
        lines += [f"{package}:", *(f"  {stage.name:<{width}}  {stage.does}" for stage in stages)]
    return "\n".join([*lines, MORE])

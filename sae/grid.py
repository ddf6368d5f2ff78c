"""Several runs from one file: the flags in which they differ.

    [grid]                                # every combination
    architecture = ["topk", "batchtopk"]
    k = [16, 32]

    [[run]]                               # and single ones
    name = "wide"
    n_latents = 16384

What decides the rows is the same for all, since all learn from the same rows.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from core.cli import typed
from core.text import parse_toml, read_text
from sae.hyperparameters import Hyperparameters

ConfigT = TypeVar("ConfigT")

SHARED = ("batch_size", "epochs", "max_steps", "rows_seed")
"""Flags that decide which rows a step takes."""
NAMES = ("seed", "site", *(item.name for item in fields(Hyperparameters) if item.name not in SHARED))
BARE = ("architecture", "site")
"""Values that say what they are: a folder's name holds them without the flag's."""


def read_runs(config: ConfigT, path: Path) -> list[ConfigT]:
    """The runs of the file `path`, each `config` with its own flags and a folder of its own in --out.

    ValueError in one line for what the file should not hold.
    """
    try:
        data = parse_toml(read_text(path, "the file"))
    except OSError as error:
        raise ValueError(f"--runs {path}: {error.strerror}; expected a TOML file") from None
    except ValueError as error:
        raise ValueError(f"--runs {path}: not valid TOML: {error}") from None
    try:
        named = dict[str, dict[str, Any]]()
        for name, values in _runs(data):
            if name in named:
                raise ValueError(f"two runs are called {name!r}; expected a `name` for one of them")
            named[name] = values
        if not named:
            raise ValueError("no run; expected a table [grid], or one [[run]] for each")
        return [_made(config, name, values) for name, values in named.items()]
    except ValueError as error:
        raise ValueError(f"--runs {path}: {error}") from None


def _runs(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and flags of each run."""
    if unknown := sorted(data.keys() - {"grid", "run"}):
        raise ValueError(f"unknown table {unknown[0]!r}; expected [grid] and [[run]]")
    grid, listed = data.get("grid", {}), data.get("run", [])
    if not isinstance(grid, dict) or not isinstance(listed, list):
        raise ValueError("expected a table [grid], and [[run]] with two brackets for each run")
    if grid:
        axes = [values if isinstance(values, list) else [values] for values in grid.values()]
        for combination in itertools.product(*axes):
            values = dict(zip(grid, combination, strict=True))
            yield _name(values), values
    for values in listed:
        values = dict(values)
        name = values.pop("name", None)
        yield str(name or _name(values)), values


def _name(values: dict[str, Any]) -> str:
    """Such as topk-k16-lr0.001."""
    parts = []
    for name, value in values.items():
        text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(text if name in BARE else f"{name.replace('_', '-')}{text}")
    return "-".join(parts)


def _made(config: ConfigT, name: str, values: dict[str, Any]) -> ConfigT:
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise ValueError(f"{name!r} cannot be a folder's name; expected letters, digits and .+-_")
    for key in values:
        if key.replace("-", "_") in SHARED:
            raise ValueError(f"{key!r} decides the rows, which all runs share; give it as a flag")
        if key.replace("-", "_") not in NAMES:
            raise ValueError(f"unknown name {key!r}; expected some of {', '.join(NAMES)}")
    try:
        own: Any = typed(type(config), values)
        out: Path = config.out / name  # type: ignore[attr-defined]
        return replace(config, **own, out=out, runs=None)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"run {name}: {error}") from None

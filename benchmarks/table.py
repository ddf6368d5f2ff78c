"""What the benchmarks share: timing, pairs in turns, and a table printed row by row and then written as JSON."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch


class Line(Protocol):
    """A line of some table."""

    def _asdict(self) -> dict[str, Any]: ...


class Row(NamedTuple):
    """Ours beside theirs."""

    measure: str
    ours: float
    theirs: float
    ratio: float
    reach: str
    reached: bool | None

    def __str__(self) -> str:
        figures = f"{self.ours:>12,.4g} {self.theirs:>12,.4g} {self.ratio:>8.2f}"
        return f"{self.measure:<74} {figures}  {self.reach:<10} {said(self.reached)}"


HEADER = f"{'measure':<74} {'ours':>12} {'theirs':>12} {'ratio':>8}  {'to reach':<10} reached"


def said(reached: bool | None) -> str:
    """Whether a mark is reached; nothing where there is none."""
    return {True: "yes", False: "NO", None: ""}[reached]


def seconds(work: Callable[[], Any]) -> float:
    """Time until `work` and all that it began on a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(works: tuple[Callable[[], Any], Callable[[], Any]], rounds: int) -> list[tuple[float, float]]:
    """Seconds of both, in changing order, after one run of each to warm up."""
    for work in works:
        seconds(work)
    pairs: list[tuple[float, float]] = []
    for i in range(rounds):
        spent = {which: seconds(works[which]) for which in ((0, 1) if i % 2 == 0 else (1, 0))}
        pairs.append((spent[0], spent[1]))
    return pairs


def race(measure: str, works: tuple[Callable[[], Any], Callable[[], Any]], n_tokens: int, reach: float, rounds: int) -> Row:
    """Tokens per second of each, and the median of the ratios of neighbours."""
    pairs = in_turns(works, rounds)
    ours, theirs = (n_tokens / statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return Row(measure, ours, theirs, ratio, f">= {reach:g}x", ratio >= reach)


def machine_name(on_gpu: bool) -> str:
    """What the figures were measured on."""
    return torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def publish(rows: Iterable[Line], out: Path, config: object, header: str = HEADER, **about: str) -> None:
    """Print `about` and each row as it comes, then write all of it to `out`."""
    about = about | {"torch": torch.__version__}
    print(", ".join(value if name == "device" else f"{name} {value}" for name, value in about.items()))
    print(header)
    done: list[Line] = []
    for row in rows:
        print(row, flush=True)
        done.append(row)
    flags = {name: str(value) for name, value in vars(config).items() if name != "out"}
    record = about | {"config": flags, "rows": [row._asdict() for row in done]}
    out.write_text(json.dumps(record, indent=1) + "\n")

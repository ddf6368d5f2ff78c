"""A training step while other programs use the cores: how OpenMP's threads wait for one another, and what that costs.

    python -m benchmarks.bench_contention --out contention.json         # on an idle machine

A setting holds for a whole process, so each is timed in processes of its own, in turns, beside 0, 1, 2, ... busy loops. The fair
share of steps beside n loops is cores / (cores + n): every thread and every loop gets as much of a core.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

SETTINGS = {
    "OpenMP's own": {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""},
    "passive": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": ""},
    "spins 500": {"GOMP_SPINCOUNT": "500"},
    "spins 2,000 (ours)": {"GOMP_SPINCOUNT": "2000"},
    "spins 10,000": {"GOMP_SPINCOUNT": "10000"},
}
"""Of each setting the variables; an empty one is taken out of the environment."""
WARM_UP_S = 2.0


@dataclass(frozen=True, kw_only=True)
class ContentionConfig:
    """What is measured."""

    out: Path = Path("contention.json")
    """JSON with every timing."""
    d: int = 576
    n: int = 8192
    k: int = 32
    batch: int = 1024
    rounds: int = 5
    seconds: float = 10.0
    """Of each timing."""
    busy: tuple[int, ...] = (0, 1, 2)
    """Busy loops beside."""
    step_only: bool = False
    """Time the step in this process and print steps per second: what the benchmark starts."""


class Line(NamedTuple):
    """A setting beside so many busy loops."""

    setting: str
    busy: int
    steps_per_s: float
    of_idle: float
    """Of the steps that OpenMP's own setting makes without busy loops."""
    fair: float


def time_step(config: ContentionConfig) -> float:
    """Steps per second of training in this process."""
    import torch

    from benchmarks.sae_peers import Ours, Setup

    ours = Ours(Setup(config.d, config.n, config.k, config.batch))
    z = torch.randn(config.batch, config.d)

    def steps_for(seconds: float) -> float:
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            ours.step(z)
            done += 1
        return done / (time.perf_counter() - began)

    steps_for(WARM_UP_S)
    return steps_for(config.seconds)


@contextlib.contextmanager
def busy_loops(n: int) -> Iterator[None]:
    """Programs that do nothing but use a core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def timed(config: ContentionConfig, setting: str) -> float:
    """`time_step` in a process with that setting."""
    shape = [part for name in ("d", "n", "k", "batch", "seconds") for part in (f"--{name}", str(getattr(config, name)))]
    environment = os.environ | SETTINGS[setting]
    for name, value in SETTINGS[setting].items():
        if not value:
            del environment[name]
    command = [sys.executable, "-m", "benchmarks.bench_contention", "--step-only", *shape]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main(config: ContentionConfig) -> None:
    if config.step_only:
        print(time_step(config))
        return
    cores = len(os.sched_getaffinity(0))
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(config.rounds):
        for busy in config.busy:
            for setting in SETTINGS:
                with busy_loops(busy):
                    rates.setdefault((setting, busy), []).append(timed(config, setting))
    idle = statistics.median(rates["OpenMP's own", min(config.busy)])
    lines = [
        Line(setting, busy, rate := statistics.median(found), rate / idle, cores / (cores + busy))
        for (setting, busy), found in rates.items()
    ]
    print(f"{cores} cores; {'setting':<20} {'busy loops':>10} {'steps/s':>9} {'of idle':>8} {'fair':>6}")
    for line in lines:
        print(f"{line.setting:<29} {line.busy:>10} {line.steps_per_s:>9.2f} {line.of_idle:>8.2f} {line.fair:>6.2f}")
    every: list[dict[str, Any]] = [line._asdict() | {"every": rates[line.setting, line.busy]} for line in lines]
    config.out.write_text(json.dumps({"cores": cores, "lines": every}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(ContentionConfig))

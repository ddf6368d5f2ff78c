"""Stages one after the other, each a command of its own that is printed before it runs; finished stages are reused."""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One command of the path and what it writes."""

    title: str
    module: str
    flags: tuple[str, ...]
    out: Path

    @property
    def command(self) -> list[str]:
        return ["-m", *self.module.split(), *self.flags, "--out", str(self.out)]

    @property
    def name(self) -> str:
        """The module's last name."""
        return self.module.split()[0].rpartition(".")[2]


def run_all(stages: Sequence[Stage]) -> list[float]:
    """Run the stages in order; returns the seconds of each. SystemExit with its code where one fails."""
    return [_run(number, len(stages), stage) for number, stage in enumerate(stages, 1)]


def _run(number: int, total: int, stage: Stage) -> float:
    print(f"\n[{number}/{total}] {stage.title}\n      $ python {shlex.join(stage.command)}", flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, *stage.command], check=False)
    if done.returncode:
        print(f"error: {stage.module} ended with exit code {done.returncode}; the line above says why", file=sys.stderr)
        raise SystemExit(done.returncode)
    return time.monotonic() - began

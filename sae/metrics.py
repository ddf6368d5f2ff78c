"""Where training writes how it goes: `metrics.jsonl` always, Weights & Biases if asked for."""

import math
from pathlib import Path
from typing import Any

from core import files
from core.lines import LineWriter, read_lines, sealed
from sae.wandb import Wandb

ADVICE = "rename it, and the same command goes on with a new one; weights and checkpoints do not depend on it"


class Metrics:
    """`metrics.jsonl`, one line per `write`; lines after the step that training resumes from are removed first.

    Each line ends with its checksum, `xxh3` (core/lines.py).
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        """ValueError where a line of an earlier run is damaged."""
        self._copy: Wandb | None = None
        kept = [line for line in read_lines(path, ADVICE).records if line.get("step", math.inf) <= resumed_step]
        files.replace(path, b"".join(map(sealed, kept)))
        self._lines = LineWriter(path, ADVICE)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Numbers that do not exist (0 / 0) become null."""
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        self._lines.write(line)
        if self._copy is not None:
            self._copy.check()

    def copy_to(self, copy: Wandb) -> None:
        """Have `copy` follow this file."""
        self._copy = copy

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()


class NoMetrics:
    """What ranks other than 0 write to."""

    def write(self, line: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

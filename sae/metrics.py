"""Where training writes how it goes: `metrics.jsonl` always, Weights & Biases if asked for."""

import json
import math
from pathlib import Path
from typing import Any

from core import files
from sae.wandb import Wandb


class Metrics:
    """`metrics.jsonl`, a line per `write`; lines behind the step that training continues from are removed first."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        self._copy: Wandb | None = None
        kept = [line for line in _read_lines(path) if line["step"] <= resumed_step]
        files.publish(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Numbers that do not exist (0 / 0) become null."""
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        files.append_line(self._path, json.dumps(line))
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


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an earlier run; what a crash cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines

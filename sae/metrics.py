"""Where training tells how it goes: `metrics.jsonl` always, Weights & Biases if asked for."""

import importlib
import math
import os
from pathlib import Path
from typing import Any, Literal

from core import files
from core.lines import LineWriter, read_lines, sealed

ADVICE = "rename it, and the same command goes on with a new one; weights and checkpoints do not depend on it"

WandbMode = Literal["auto", "off", "offline", "online"]


class Wandb:
    """A Weights & Biases run in `folder`. A copy for looking at; nothing is ever read back from it."""

    def __init__(self, folder: Path, mode: WandbMode, config: dict[str, Any]) -> None:
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        wandb = importlib.import_module("wandb")  # half a second, for those who use it
        self._run = wandb.init(project="llama3-sae", dir=folder, mode=mode, config=config, settings=wandb.Settings(silent=True))

    def log(self, line: dict[str, Any]) -> None:
        self._run.log(line, step=line["step"])

    def close(self) -> None:
        self._run.finish()


class NoWandb:
    """Takes everything and does nothing."""

    def log(self, line: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Metrics:
    """`metrics.jsonl`, a line per `write`; lines behind the step that training continues from are removed first.

    Each line ends with its checksum, `xxh3` (core/lines.py).
    """

    def __init__(self, path: Path, resumed_step: int, wandb: Wandb | NoWandb) -> None:
        """ValueError where a line of an earlier run is damaged."""
        kept = [line for line in read_lines(path, ADVICE).records if line.get("step", math.inf) <= resumed_step]
        files.publish(path, b"".join(map(sealed, kept)))
        self._lines, self._wandb = LineWriter(path, ADVICE), wandb

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Numbers that do not exist (0 / 0) become null."""
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        self._lines.write(line)
        self._wandb.log(line)

    def close(self) -> None:
        self._wandb.close()


class NoMetrics:
    """What ranks other than 0 write to."""

    def write(self, line: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

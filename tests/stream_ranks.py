"""What tests/test_streaming.py runs under torchrun: whole runs while the model runs, on several ranks."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from core.runtime import Runtime, open_runtime
from sae import train
from sae.streaming.reader import StreamReader
from sae.trainer import Trainer
from tests.test_streaming import config


def main(house: Path, out: Path) -> None:
    with open_runtime("cpu", threads=1, timeout_s=60) as runtime:
        noted_run(runtime, house, out / "rows")
        train.run(config(house, out / "latents", latent_parallel=2, dtype="float64"), runtime)
        stopped(runtime, house, out / "stopped")


def noted_run(runtime: Runtime, house: Path, out: Path) -> None:
    """With the rows of each step, of all ranks together, in files of their own."""
    take = StreamReader.take
    taken: list[torch.Tensor] = []

    def noted(reader: StreamReader, step: int) -> torch.Tensor:
        rows = take(reader, step)
        taken.append(torch.cat(runtime.gather_objects(rows)))
        return rows

    StreamReader.take = noted  # type: ignore[method-assign]
    train.run(config(house, out, dtype="float64"), runtime)
    StreamReader.take = take  # type: ignore[method-assign]
    if runtime.is_main:
        torch.stack(taken).numpy().tofile(out / "rows.bin")


def stopped(runtime: Runtime, house: Path, out: Path) -> None:
    """SIGTERM reaches the last rank in the middle of a window: all ranks end after that step."""
    step = Trainer.train_step

    def interrupted(trainer: Trainer, *wishes: Any) -> Any:
        if trainer.step == 8 and runtime.rank == runtime.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *wishes)

    Trainer.train_step = interrupted  # type: ignore[method-assign]
    try:
        train.run(config(house, out, dtype="float64", checkpoint_every=0), runtime)
    except SystemExit as end:
        codes = runtime.gather_objects(end.code)
    Trainer.train_step = step  # type: ignore[method-assign]
    assert codes == [128 + signal.SIGTERM] * runtime.world_size, codes


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""What tests/test_sae_train.py runs under torchrun: training on several ranks, with checks that need all of them."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.runtime import Runtime, open_runtime
from sae import train
from sae.batches import Batches
from sae.model import SAE
from sae.train import TrainConfig
from sae.trainer import Hyperparameters, Trainer

SMALL: dict[str, Any] = {"n_latents": 96, "k": 3, "batch_size": 60, "lr": 3e-3, "dead_after_tokens": 120, "aux_k": 8}


def main(batches: Path, out: Path) -> None:
    with open_runtime("cpu", threads=1, timeout_s=60) as runtime:
        trained_alike(runtime, batches)
        refused_by_all(runtime, batches)
        train.run(TrainConfig(batches=batches, out=out / "float32", wandb="off", log_every=1, **SMALL), runtime)
        stopped_together(runtime, batches, out / "stopped")


def trained_alike(runtime: Runtime, batches: Path) -> None:
    """Weights and counters are bit-equal on all ranks, with dead latents, and with shares of unequal size in the last batch."""
    trainer = Trainer(Hyperparameters(**SMALL), runtime, Batches(batches))
    n_dead = []
    while trainer.step < trainer.total_steps:
        trainer.train_step()
        n_dead.append(len(trainer.dead()))
    assert max(n_dead) > 0
    states = runtime.gather_objects(flat(trainer))
    for other in states[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in states[0].items())


def flat(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.state()
    return {name: tensor for name, tensor in (state.shared | state.latents).items() if name != "rng"}


def refused_by_all(runtime: Runtime, batches: Path) -> None:
    """NaN in the rows of the last rank alone stops every rank within the step, with nothing changed."""
    trainer = Trainer(Hyperparameters(**SMALL), runtime, Batches(batches))
    trainer.train_step()
    before = flat(trainer)
    normalise = SAE.normalise
    if runtime.rank == runtime.world_size - 1:
        SAE.normalise = lambda sae, x: normalise(sae, x * float("nan"))  # type: ignore[method-assign]
    try:
        trainer.train_step()
        message = ""
    except ValueError as error:
        message = str(error)
    SAE.normalise = normalise  # type: ignore[method-assign]
    assert all("must be finite" in text for text in runtime.gather_objects(message))
    assert all(torch.equal(tensor, before[name]) for name, tensor in flat(trainer).items())


def stopped_together(runtime: Runtime, batches: Path, out: Path) -> None:
    """SIGTERM reaches rank 1 alone in step 5: all ranks end after that step."""
    config = TrainConfig(batches=batches, out=out, wandb="off", log_every=1, checkpoint_every=0, dtype="float64", **SMALL)
    step = Trainer.train_step

    def interrupted(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.step == 3 and runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments)

    Trainer.train_step = interrupted  # type: ignore[method-assign]
    try:
        train.run(config, runtime)
    except SystemExit as end:
        codes = runtime.gather_objects(end.code)
    assert codes == [128 + signal.SIGTERM] * runtime.world_size, codes


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

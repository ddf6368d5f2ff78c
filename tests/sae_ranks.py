"""What tests/test_sae_train.py runs under torchrun: training on several ranks, with checks that need all of them."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from core.runtime import Runtime, open_runtime
from sae import train
from sae.architectures import names
from sae.batches import Batches
from sae.model import SAE
from sae.train import TrainConfig
from sae.trainer import Hyperparameters, Trainer

SMALL: dict[str, Any] = {"n_latents": 96, "k": 3, "batch_size": 60, "lr": 3e-3, "dead_after_tokens": 120, "aux_k": 8}


def main(batches: Path, out: Path, long: int) -> None:
    with open_runtime("cpu", threads=1, timeout_s=60) as runtime:
        if runtime.world_size == 2:
            trained_alike(runtime, batches)
            refused_by_all(runtime, batches)
            drift_is_noticed(runtime, batches)
            train.run(TrainConfig(batches=batches, out=out / "float32", wandb="off", log_every=1, **SMALL), runtime)
            stopped_together(runtime, batches, out / "stopped")
        if runtime.world_size == 4:  # what one process began
            train.run(double_run(batches, out / "resumed", latent_parallel=2), runtime)
        for name, (latent_parallel, settings, steps) in layouts(runtime.world_size, long).items():
            trainer = trained(runtime, batches, latent_parallel, settings, steps)
            trainer.check_replicas()
            save(trainer, out / f"{name}.safetensors")


def layouts(world_size: int, long: int) -> dict[str, tuple[int, dict[str, Any], int]]:
    """Runs to compare with one process: ranks in a latent group, hyperparameters, steps, of which the most are `long`."""
    double: dict[str, Any] = {"dtype": "float64"}
    if world_size == 2:
        return {
            "rows": (1, double, long),
            "latents": (2, double, long),
            "rows-float32-1": (1, {}, 1),
            "latents-float32-1": (2, {}, 1),
            "latents-float32": (2, {}, long),
            "latents-accumulated": (2, double | {"accumulate": 3, "clip_norm": 0.05}, 20),
        }
    return {
        "rows": (1, double, long),
        "latents": (4, double, long),
        "both": (2, double, long),
        "both-float32-1": (2, {}, 1),
        "both-float32": (2, {}, long),
    } | {
        f"both-{architecture}": (2, double | {"architecture": architecture, "sparsity": 0.01, "k": 6}, 20)
        for architecture in names()
    }


def double_run(batches: Path, out: Path, **overrides: Any) -> TrainConfig:
    values = {"wandb": "off", "log_every": 1, "checkpoint_every": 0, "dtype": "float64"} | SMALL | overrides
    return TrainConfig(batches=batches, out=out, **values)


def trained(runtime: Runtime, batches: Path, latent_parallel: int, settings: dict[str, Any], steps: int) -> Trainer:
    """Also used by the one process to compare with."""
    hyperparameters = Hyperparameters(**SMALL | {"epochs": 20} | settings)
    trainer = Trainer(hyperparameters, runtime, Batches(batches), 0, latent_parallel)
    for _ in range(steps):
        trainer.train_step()
    return trainer


def save(trainer: Trainer, path: Path) -> None:
    """All latents, what Adam knows of them and when they fired, as rank 0 finds them in the ranks' states."""
    latent = trainer.mesh.latent
    state = trainer.state()
    whole = {name: latent.all_gather(tensor).flatten(0, 1) for name, tensor in state.latents.items()}
    whole |= {"fvu": torch.tensor(trainer.validate(0)["val_fvu"])} | {
        n: t for n, t in state.shared.items() if n not in ("rng", "lowest_val_loss")
    }
    if trainer.runtime.is_main:
        safetensors.torch.save_file(whole, path)


def drift_is_noticed(runtime: Runtime, batches: Path) -> None:
    """One bit of one weight differs on rank 1: all ranks say so."""
    trainer = Trainer(Hyperparameters(**SMALL), runtime, Batches(batches))
    trainer.check_replicas()
    if runtime.rank == 1:
        with torch.no_grad():
            trainer.sae.W_enc[95, 9] = torch.nextafter(trainer.sae.W_enc[95, 9], torch.tensor(9.0))
    try:
        trainer.check_replicas()
        message = ""
    except ValueError as error:
        message = str(error)
    assert all("rank(s) 1 differ" in text for text in runtime.gather_objects(message)), message


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
    step = Trainer.train_step

    def interrupted(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.step == 3 and runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments)

    Trainer.train_step = interrupted  # type: ignore[method-assign]
    try:
        train.run(double_run(batches, out), runtime)
    except SystemExit as end:
        Trainer.train_step = step  # type: ignore[method-assign]
        codes = runtime.gather_objects(end.code)
    assert codes == [128 + signal.SIGTERM] * runtime.world_size, codes


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

"""What `sae.train --plan` predicts, against what training takes: bytes of PyTorch's CPU allocator, and of the folder."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sae.architectures import names
from sae.batches import Batches
from sae.hyperparameters import Hyperparameters
from sae.memory import Share, memory_of_rank
from sae.plan import Amount, plan
from sae.train import TrainConfig, run
from sae.trainer import Trainer
from tests.sae_folders import ALONE, make_batches, sparse_rows

D = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_batches(tmp_path_factory.mktemp("rows"), sparse_rows(1200, D, 100, active=6)[0], batch_rows=256)


def amount(batches: Path) -> Amount:
    return Amount(D, len(Batches(batches).train))


def peak_bytes(act: Callable[[], object]) -> int:
    """Bytes that `act` holds at once, at most, beyond what was there before; scratch memory of libraries is not seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        act()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    now = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        most = max(most, now)
    return most


def held_bytes(trainer: Trainer) -> int:
    """Weights and Adam's moments."""
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    return sum(tensor.nbytes for tensor in (*trainer.sae.state_dict().values(), *moments))


@pytest.mark.parametrize("architecture", names())
@pytest.mark.parametrize(("all_dead", "rows"), [(False, 512), (True, 512), (False, 40), (True, 40)])
def test_memory_is_within_a_tenth(architecture: Any, all_dead: bool, rows: int, batches: Path) -> None:
    """With pre-activations larger than gradients, and smaller. Where AuxK is on, all latents are dead: what is predicted."""
    coefficient = 1 / 32 if all_dead else 0.0
    shape: dict[str, Any] = {"n_latents": 4096, "k": 16, "batch_size": rows, "epochs": 3}
    config = Hyperparameters(architecture=architecture, aux_coefficient=coefficient, **shape)
    trainer = Trainer(config, ALONE, Batches(batches))
    trainer.train_step()
    peaks = []
    for _ in range(5):  # now and then the profiler loses an event
        trainer.step = 0  # later ones may hold fewer rows
        if all_dead:
            trainer.last_fired.fill_(-config.dead_after_tokens)
        peaks.append(peak_bytes(trainer.train_step))
    measured = held_bytes(trainer) + statistics.median(peaks)
    predicted = plan(config, amount(batches), ALONE, 1, Path.cwd(), keep=2).memory
    assert sum(predicted) == pytest.approx(measured, rel=0.1)
    assert predicted.held == pytest.approx(held_bytes(trainer), rel=0.01)


def test_disk_is_within_a_tenth(batches: Path, tmp_path: Path) -> None:
    """The most that lies there at any moment: as many checkpoints as are kept, one being written, and the SAE."""
    config = TrainConfig(
        batches=batches, out=tmp_path / "run", n_latents=4096, k=16, batch_size=512, epochs=2, checkpoint_every=1, wandb="off"
    )
    predicted = plan(config, amount(batches), ALONE, 1, tmp_path, config.keep).disk
    run(config, ALONE)
    sizes = {
        path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in (tmp_path / "run" / "sae", *(tmp_path / "run" / "checkpoints").iterdir())
    }
    checkpoint = max(size for name, size in sizes.items() if name != "sae")
    assert predicted == pytest.approx((config.keep + 1) * checkpoint + sizes["sae"], rel=0.1)


def test_it_says_which_flag_to_turn(batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(**flags: Any) -> str:
        settings = {"n_latents": 96, "k": 3, "batch_size": 60, "wandb": "off"} | flags
        run(TrainConfig(batches=batches, out=tmp_path / "run", plan=True, **settings), ALONE)
        return capsys.readouterr().out

    assert "it fits" in say()
    assert "raise --latent-parallel" in say(n_latents=2**40)
    assert "lower --keep" in say(n_latents=2**24, keep=1000)
    assert not (tmp_path / "run").exists()


def test_memory_falls_with_the_latents_of_a_rank_and_the_rows_of_a_part() -> None:
    config = Hyperparameters(k=8, n_latents=2**16)
    one, four = (memory_of_rank(config, Share(2**16 // ranks, 512, 4096, 1, CPU)) for ranks in (1, 4))
    assert four.held < 0.26 * one.held
    whole, parts = (Hyperparameters(k=8, architecture="relu", accumulate=parts) for parts in (1, 4))
    assert (
        memory_of_rank(parts, Share(2**16, 512, 4096, 1, CPU)).step
        < 0.3 * memory_of_rank(whole, Share(2**16, 512, 4096, 1, CPU)).step
    )

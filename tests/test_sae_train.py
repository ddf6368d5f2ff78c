"""Training: it learns, it is the same on any number of ranks, and it continues to the bit after a kill at any moment."""

import math
import os
import random
import signal
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch._dynamo  # an optimizer would import it: here once, and not in every child of the fork server
from torch import Tensor

from core.artifact import verify
from core.cli import parse
from core.lines import read_lines
from sae.batches import Batches, Schedule
from sae.checkpoint import Checkpoints, complete, latents_name, read_state, remove_old_checkpoints
from sae.model import SAEConfig, load
from sae.optimizer_step import ByAutograd, ByHand
from sae.preprocess import PreprocessConfig
from sae.preprocess import run as preprocess
from sae.running_statistics import geometric_median
from sae.train import TrainConfig, run
from sae.trainer import Hyperparameters, State, Trainer
from tests.conftest import Launch
from tests.faults import ForkServer
from tests.sae_folders import ALONE, SITE, make_batches, sparse_rows
from tests.sae_ranks import SMALL, double_run, layouts, save, trained


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 670 training rows of width 10: eleven whole steps of 60, and one that is not."""
    rows, _ = sparse_rows(750, 10, 30, active=3)
    return make_batches(tmp_path_factory.mktemp("rows"), rows + 0.5, batch_rows=32)


def config(batches: Path, out: Path, **overrides: Any) -> TrainConfig:
    values = {"batches": batches, "out": out, "wandb": "off", "log_every": 1, "checkpoint_every": 3} | SMALL | overrides
    return TrainConfig(**values)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "metrics.jsonl", "").records


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: v for name, v in line.items() if name not in ("activations_per_s", "floor_share")} for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load(folder / "sae").named_parameters())


def same_weights(a: Path, b: Path) -> bool:
    return all(torch.equal(tensor, weights(b)[name]) for name, tensor in weights(a).items())


def finish_run(batches: str, out: str) -> None:
    """For the fork server."""
    run(config(Path(batches), Path(out)), ALONE)


# a step --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["dataset", "layer", "none"])
def test_decoder_rows_stay_units_and_their_gradients_orthogonal(batches: Path, norm: str, monkeypatch: Any) -> None:
    """Where autograd makes them; topk's are compared with it below."""
    settings = Hyperparameters(**SMALL, norm=norm, architecture="batchtopk")  # type: ignore[arg-type]
    trainer = Trainer(settings, ALONE, Batches(batches))
    cosines = []
    step = torch.optim.Adam.step

    def watched(optimizer: Any) -> Any:
        W_dec, gradient = trainer.sae.W_dec.detach(), trainer.sae.W_dec.grad
        assert gradient is not None
        cosines.append((gradient * W_dec).sum(1).abs().max() / gradient.norm(dim=1).max())
        return step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    start = trainer.sae.W_dec.detach().clone()
    for _ in range(6):
        trainer.train_step()
        torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(96))
    assert max(cosines) < 1e-6
    assert not torch.equal(trainer.sae.W_dec, start)


def test_a_step_equals_dense_autograd_and_torch_adam(batches: Path) -> None:
    """Three steps written out with dense matrices, in float64, with dead latents from the second step on."""
    settings = Hyperparameters(**SMALL | {"dead_after_tokens": 60, "dtype": "float64", "clip_norm": 0.05, "warmup_steps": 2})
    trainer, data = Trainer(settings, ALONE, Batches(batches)), Batches(batches)
    W_dec, W_enc, b_enc, b_pre = (getattr(trainer.sae, n).detach().clone() for n in ("W_dec", "W_enc", "b_enc", "b_pre"))
    twin = [t.requires_grad_() for t in (W_dec, W_enc, b_enc, b_pre)]
    adam = torch.optim.Adam(twin, lr=1.0, betas=settings.betas, eps=settings.eps)
    last_fired, n_dead = torch.zeros(96), []
    scale = math.sqrt(10) / data.statistics.mean_norm
    for step in range(3):
        z = data.train.read(60 * step, 60 * step + 60).double() * scale
        h = (z - b_pre) @ W_enc.T + b_enc
        latents = h.relu() * torch.zeros_like(h).scatter(1, h.topk(3).indices, 1.0)
        error = z - (latents @ W_dec + b_pre)
        dead = 60 * step - last_fired >= 60
        n_dead.append(int(dead.sum()))
        loss = error.square().mean()
        if dead.any():
            only_dead = h.masked_fill(~dead, -math.inf)
            chosen = torch.zeros_like(h).scatter(1, only_dead.topk(min(8, n_dead[-1])).indices, 1.0)
            loss = loss + min(1, n_dead[-1] / 8) / 32 * (error.detach() - (h.relu() * chosen) @ W_dec).square().mean()
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(twin, 0.05)
            adam.param_groups[0]["lr"] = settings.lr_at(step, trainer.total_steps)
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        last_fired[(latents > 0).any(0)] = 60 * step + 60
        result = trainer.train_step()
        assert result.loss == pytest.approx(error.square().mean().item())
        assert result.dead_fraction == n_dead[-1] / 96
    assert n_dead[0] == 0 < n_dead[1]
    assert torch.equal(trainer.last_fired, last_fired.long())
    for ours, theirs in zip((trainer.sae.W_dec, trainer.sae.W_enc, trainer.sae.b_enc, trainer.sae.b_pre), twin, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("accumulate", "clip_norm"), [(1, 0.0), (3, 0.05)])
def test_by_hand_equals_autograd_over_200_steps(
    batches: Path, accumulate: int, clip_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with dead latents, shares of unequal size, and a last batch that is not whole."""
    settings = {"dtype": "float64", "accumulate": accumulate, "clip_norm": clip_norm, "weight_decay": 0.01}
    ours = trained(ALONE, batches, 1, settings, 200)
    monkeypatch.setattr("sae.trainer.optimizer_step", ByAutograd)
    theirs = trained(ALONE, batches, 1, settings, 200)
    assert isinstance(ours.optimizer_step, ByHand)
    assert len(ours.dead()) > 0
    for mine, twin in zip(ours.state(), theirs.state(), strict=True):
        assert mine.keys() == twin.keys()
        for name, tensor in mine.items():
            if name not in ("rng", "lowest_val_loss"):
                assert (tensor - twin[name]).abs().max() <= 1e-10 * twin[name].abs().max(), name
    a, b = ours.train_step(), theirs.train_step()
    assert float(a.gradient_norm) == pytest.approx(float(b.gradient_norm), rel=1e-8)
    assert (a.loss, a.aux_loss, a.l0) == pytest.approx((b.loss, b.aux_loss, b.l0), rel=1e-9)


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    settings = Hyperparameters(lr=1.0, lr_end=0.1, warmup_steps=4)
    rates = [settings.lr_at(step, 105) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert Hyperparameters(n_latents=4096).peak_lr == pytest.approx(1e-3)


# which rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_rows", "batch_rows", "batch_size"), [(1000, 64, 96), (640, 64, 64), (5, 64, 96), (129, 64, 256)])
def test_every_row_is_read_once_an_epoch_by_any_number_of_ranks(n_rows: int, batch_rows: int, batch_size: int) -> None:
    def order(world_size: int, epoch: int) -> list[list[int]]:
        schedule = Schedule(n_rows, batch_rows, batch_size, seed=1)
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        out = []
        for step in steps:
            ranks = [schedule.segments(step, rank, world_size) for rank in range(world_size)]
            out.append([row for segments in ranks for start, stop in segments for row in range(start, stop)])
            assert len(out[-1]) == schedule.rows_in(step)
        return out

    for epoch in (0, 1, 2):
        alone = order(1, epoch)
        assert sorted(chain.from_iterable(alone)) == list(range(n_rows))
        assert alone == order(2, epoch) == order(3, epoch) == order(7, epoch)
    assert list(chain.from_iterable(order(1, 0))) == list(range(n_rows))
    if n_rows == 1000:
        assert order(1, 1) != order(1, 2) != order(1, 0)


# whole runs ----------------------------------------------------------------------------------------------------------


def test_a_known_dictionary_is_found(tmp_path: Path) -> None:
    """Rows made of 3 of 40 directions: a TopK SAE explains nearly all of them, and most directions are among its own."""
    rows, directions = sparse_rows(6000, 24, 40, active=3)
    batches = make_batches(tmp_path, rows, batch_rows=256)
    settings = {"n_latents": 64, "k": 3, "batch_size": 256, "epochs": 8, "lr": 1e-2, "dead_after_tokens": 5000, "aux_k": 0}
    run(config(batches, tmp_path / "run", **settings, checkpoint_every=0, log_every=100), ALONE)
    last = read_metrics(tmp_path / "run")[-1]
    assert last["val_fvu"] < 0.1
    assert abs(last["val_fvu"] - last["fvu"]) < 0.05
    sae = load(tmp_path / "run" / "sae")
    best = (directions @ sae.W_dec.T).amax(1)
    assert (best > 0.9).float().mean() > 0.9
    x = Batches(batches).validation.read(0, 200)
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(fvu) == pytest.approx(last["val_fvu"], rel=0.2)


def test_a_run_leaves_what_later_stages_need(batches: Path, tmp_path: Path) -> None:
    run(config(batches, tmp_path / "run", validate_every=4, keep=2), ALONE)
    manifest = verify(tmp_path / "run" / "sae")
    data = Batches(batches)
    steps = math.ceil(len(data.train) / 60)
    assert manifest.counts == {"n_latents": 96, "steps": steps, "tokens": len(data.train)}
    sae = load(tmp_path / "run" / "sae")
    assert manifest.provenance["sae_hash"] == sae.weights_hash
    assert manifest.inputs == [data.artifact.as_input()]
    for name, value in {"site": SITE, "model_hash": "m", "tokenizer_hash": "t", "bos": "none", "training_steps": steps}.items():
        assert sae.cfg.provenance[name] == manifest.provenance[name] == value
    assert sae.cfg.scale == pytest.approx(math.sqrt(10) / data.statistics.mean_norm)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    names = {"step", "tokens", "loss", "aux_loss", "fvu", "l0", "dead_fraction", "lr", "activations_per_s"}
    assert all(names <= line.keys() for line in lines)
    validated = [line["step"] for line in lines if {"val_loss", "val_aux_loss", "val_fvu"} <= line.keys()]
    assert validated == [*range(4, steps, 4), steps]
    assert lines[-1]["tokens"] == len(data.train)
    assert lines[-1]["fvu"] == pytest.approx(lines[-1]["loss"] * 10 / data.statistics.total_variance("dataset"))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in range(3, steps, 3)[-2:]]


def test_a_finished_run_is_left_alone_and_other_flags_are_refused(batches: Path, tmp_path: Path) -> None:
    run(config(batches, tmp_path / "run"), ALONE)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    run(config(batches, tmp_path / "run", checkpoint_every=5), ALONE)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match=r"--lr 0\.003, now 0\.1"):
        run(config(batches, tmp_path / "run", lr=0.1), ALONE)


def test_continues_to_the_bit_after_an_interruption_at_any_step(batches: Path, tmp_path: Path, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    run(config(batches, tmp_path / "clean"), ALONE)
    clean = read_metrics(tmp_path / "clean")
    step = Trainer.train_step
    for moment in (0, 2, 3, 7, 10):
        out = tmp_path / f"cut-{moment}"
        torch.manual_seed(0)

        def cut(trainer: Trainer, *wishes: Any, moment: int = moment) -> Any:
            if trainer.step == moment:
                raise RuntimeError("cut")
            return step(trainer, *wishes)

        monkeypatch.setattr(Trainer, "train_step", cut)
        with pytest.raises(RuntimeError, match="cut"):
            run(config(batches, out), ALONE)
        monkeypatch.setattr(Trainer, "train_step", step)
        begun = any(complete(out / "checkpoints", verify=False))
        torch.manual_seed(99 if begun else 0)  # a checkpoint brings its own; without one, the runtime seeds
        run(config(batches, out), ALONE)
        assert same_weights(out, tmp_path / "clean")
        for path in sorted((out / "checkpoints").iterdir())[-1].iterdir():
            assert path.read_bytes() == (tmp_path / "clean" / path.relative_to(out)).read_bytes()
        assert untimed(read_metrics(out)) == untimed(clean)


def test_killed_at_file_operations_it_ends_with_the_same_bytes(
    batches: Path, memory_path: Path, fork_server: ForkServer
) -> None:
    assert fork_server.run(finish_run, batches, memory_path / "clean") == 0
    operations: list[str] = []
    for n in range(1, 400, 29):
        out = memory_path / str(n)
        status = fork_server.run(finish_run, batches, out, exit_at=n)
        operations.append(str(status))
        if status == 0:
            break
        assert status == 9
        assert fork_server.run(finish_run, batches, out) == 0
        for name in ("sae.safetensors", "cfg.json", "manifest.json"):
            assert (out / "sae" / name).read_bytes() == (memory_path / "clean" / "sae" / name).read_bytes()
        assert [line["step"] for line in read_metrics(out)] == [line["step"] for line in read_metrics(memory_path / "clean")]
    assert len(operations) > 5


def test_sigterm_saves_the_current_step_and_exits(batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(batches, tmp_path / "clean"), ALONE)
    previous, out = signal.getsignal(signal.SIGTERM), tmp_path / "run"
    _stop_at(6, config(batches, out, checkpoint_every=0), monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is previous
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000006"]
    run(config(batches, out, checkpoint_every=0), ALONE)
    assert same_weights(out, tmp_path / "clean")
    assert [line["step"] for line in read_metrics(out)] == [line["step"] for line in read_metrics(tmp_path / "clean")]


def logged_run(batches: str, out: str) -> None:
    """For the fork server: a longer run that notes which rows each step reads."""
    segments = Schedule.segments

    def noted(schedule: Schedule, step: int, rank: int, world_size: int) -> list[tuple[int, int]]:
        found = list(segments(schedule, step, rank, world_size))
        with Path(out).with_suffix(".rows").open("a") as file:
            file.write(f"{step} {found}\n")
        return found

    Schedule.segments = noted  # type: ignore[assignment, method-assign]
    run(config(Path(batches), Path(out), epochs=6, log_every=20), ALONE)


@pytest.mark.parametrize("n_kills", [4, pytest.param(50, marks=pytest.mark.faults)])
def test_killed_at_any_moment_it_ends_with_the_same_state(
    batches: Path, memory_path: Path, fork_server: ForkServer, n_kills: int
) -> None:
    """SIGKILL at random moments, again until the run ends: state and rows read are those of a run left alone."""

    def rows_read(out: Path) -> set[str]:
        return set(out.with_suffix(".rows").read_text().splitlines())

    assert fork_server.run(logged_run, batches, memory_path / "clean") == 0
    began = time.monotonic()
    assert fork_server.run(logged_run, batches, memory_path / "again") == 0  # the first one waited for the server's imports
    seconds = time.monotonic() - began
    moments, landed, folders = random.Random(0), 0, 0
    while landed < n_kills:
        out, status = memory_path / str(folders), -9
        while status == -9:
            status = fork_server.run(logged_run, batches, out, kill_after=moments.uniform(0.05, 0.8) * seconds)
            landed += status == -9
        assert status == 0
        assert (out / "sae" / "sae.safetensors").read_bytes() == (memory_path / "clean/sae/sae.safetensors").read_bytes()
        last = sorted((out / "checkpoints").iterdir())[-1]
        for path in last.iterdir():  # with Adam's moments, counts and random state
            assert path.read_bytes() == (memory_path / "clean" / path.relative_to(out)).read_bytes()
        assert rows_read(out) == rows_read(memory_path / "clean")
        folders += 1
        assert folders <= 2 * n_kills, "the runs end before they are killed"


@pytest.mark.parametrize(("ranks", "steps"), [(2, 200), (4, 30), pytest.param(4, 200, marks=pytest.mark.faults)])
def test_any_layout_of_ranks_gives_what_one_gives(
    fork_server: ForkServer, batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, steps: int
) -> None:
    """Rows shared out, latents shared out, and both. In float64 for as long as you like; in float32 trajectories drift apart.

    One process continues what two began, and four, which share out rows and latents, what one began.
    """
    if ranks == 4:
        _stop_at(5, double_run(batches, tmp_path / "resumed"), monkeypatch)
    done = fork_server.ranks(ranks, "tests.sae_ranks", batches, tmp_path, steps)
    assert done.returncode == 0, done.stderr
    alone: dict[str, dict[str, Tensor]] = {}
    for name, (_, settings, n) in layouts(ranks, steps).items():
        key = str((settings, n))
        if key not in alone:
            save(trained(ALONE, batches, 1, settings, n), tmp_path / "alone")
            alone[key] = safetensors.torch.load_file(tmp_path / "alone")
        together = safetensors.torch.load_file(tmp_path / f"{name}.safetensors")
        assert together.keys() == alone[key].keys()
        exact = settings.get("dtype") == "float64"
        for tensor_name, tensor in alone[key].items():
            other = together[tensor_name]
            if exact and not tensor.is_floating_point():  # counts of tokens and rows
                assert torch.equal(tensor, other), (name, tensor_name)
            elif exact or (n == 1 and tensor_name.startswith("sae.")):
                error = (tensor - other).norm() / tensor.norm().clamp_min(1e-30)
                assert error <= (1e-10 if exact else 1e-6), (name, tensor_name, error)
        assert together["fvu"] == pytest.approx(float(alone[key]["fvu"]), rel=1e-9 if exact else 0.005)
    if ranks == 2:
        _whole_runs_agree(batches, tmp_path)
    stopped = tmp_path / ("stopped" if ranks == 2 else "resumed")
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-00000005"]
    for out in (stopped, tmp_path / "whole"):
        run(double_run(batches, out), ALONE)
    begun, whole = (load(folder / "sae", dtype=torch.float64) for folder in (stopped, tmp_path / "whole"))
    for name, parameter in begun.named_parameters():
        torch.testing.assert_close(parameter, getattr(whole, name), rtol=1e-9, atol=1e-11)
    for mine, theirs in zip(read_metrics(stopped), read_metrics(tmp_path / "whole"), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9)


def _stop_at(n: int, settings: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until SIGTERM comes in step `n` - 1; step `n` is the last."""
    step = Trainer.train_step

    def interrupted(trainer: Trainer, *wishes: Any) -> Any:
        if trainer.step == n - 2:
            for _ in range(2):  # as a process group and its launcher do
                os.kill(os.getpid(), signal.SIGTERM)  # the wish of this step was read already
        return step(trainer, *wishes)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(SystemExit) as end:
        run(settings, ALONE)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert end.value.code == 128 + signal.SIGTERM


def _whole_runs_agree(batches: Path, together: Path) -> None:
    """What two ranks wrote as a run."""
    alone = together / "one"
    run(config(batches, alone, checkpoint_every=1000), ALONE)
    for name, tensor in weights(alone).items():
        assert (tensor - weights(together / "float32")[name]).norm() / tensor.norm() < 1e-5
    for mine, theirs in zip(read_metrics(alone), read_metrics(together / "float32"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for name in ("dead_fraction", "tokens", "since_fired_histogram", "density_histogram"):
            assert mine[name] == theirs[name]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, ""),
        ({"dead_after_tokens": 720}, "--dead-after-tokens 720 is not below the 720 rows of the run"),
        ({"dead_after_tokens": 719}, ""),
        ({"dead_after_tokens": 720, "aux_coefficient": 0}, ""),
        ({"warmup_steps": 13}, "--warmup-steps 13 exceeds the 12 steps of the run"),
        ({"warmup_steps": 12}, ""),
        ({"k_anneal_steps": 13}, ""),
        ({"k_start": 5, "k_anneal_steps": 13}, "--k-anneal-steps 13 exceeds"),
    ],
)
def test_a_flag_that_the_run_never_reaches_is_named(flags: dict[str, Any], said: str) -> None:
    found = Hyperparameters(**SMALL | flags).never_reached(12)
    assert said in found
    assert bool(said) == bool(found)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(batches: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step \d+: loss and gradient must be finite.*lower --lr"):
        run(config(batches, tmp_path / "run", lr=1e30, checkpoint_every=1), ALONE)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        state = read_state(path, 0, 96)
        assert all(torch.isfinite(tensor).all() for name, tensor in flat(state).items() if name != "lowest_val_loss")
    with pytest.raises(ValueError, match="has not finished"):
        load(tmp_path / "run" / "sae")


def test_less_than_one_batch_is_refused_and_two_rows_are_enough_for_batches_of_one(tmp_path: Path) -> None:
    batches = make_batches(tmp_path, torch.eye(2, 4), validation_fraction=0)
    with pytest.raises(ValueError, match="2 training rows, fewer than one batch of --batch-size 60"):
        run(config(batches, tmp_path / "run"), ALONE)
    run(config(batches, tmp_path / "run", n_latents=8, k=2, batch_size=1), ALONE)
    assert read_metrics(tmp_path / "run")[-1]["fvu"] > 0
    assert load(tmp_path / "run" / "sae").cfg.n_latents == 8


# checkpoints ---------------------------------------------------------------------------------------------------------


def flat(state: State) -> dict[str, Tensor]:
    return state.shared | state.latents


def test_old_checkpoints_go_and_a_damaged_one_is_passed_over(batches: Path, tmp_path: Path, caplog: Any) -> None:
    out, settings = tmp_path / "run", config(batches, tmp_path / "run")
    trainer = Trainer(settings, ALONE, Batches(batches))
    folder = out / "checkpoints"
    checkpoints = Checkpoints(folder, 9, settings, ALONE, trainer.mesh)
    for step in (1, 2, 3, 4):
        trainer.train_step()
        checkpoints.begin(step, trainer.state())
        checkpoints.finish()
    (folder / "step-00000001" / "manifest.json").unlink()  # cut short, and older than what is kept
    remove_old_checkpoints(folder, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]
    damaged = folder / "step-00000004" / latents_name(0)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    state = checkpoints.newest(0, 96)
    assert state is not None
    assert int(state.shared["step"]) == 3
    assert "damaged" in caplog.text
    checkpoints.begin(4, trainer.state())  # the damaged one gives way
    checkpoints.finish()
    state = checkpoints.newest(0, 96)
    assert state is not None
    assert int(state.shared["step"]) == 4
    checkpoints.close()
    assert Checkpoints(tmp_path / "nowhere", 1, settings, ALONE, trainer.mesh).newest(0, 96) is None


def test_a_checkpoint_holds_everything_the_next_step_depends_on(batches: Path) -> None:
    """A copy continues alike; with any one tensor changed it does not."""
    settings = Hyperparameters(**SMALL | {"dead_after_tokens": 60})

    def after(state: State, changed: str = "") -> dict[str, Tensor]:
        trainer = Trainer(settings, ALONE, Batches(batches))
        parts = ({name: tensor + 1 if name == changed else tensor.clone() for name, tensor in p.items()} for p in state)
        trainer.load_state(State(*parts))
        trainer.train_step()
        trainer.out_of_patience(0.5)
        return flat(trainer.state())

    trainer = Trainer(settings, ALONE, Batches(batches))
    for _ in range(4):
        trainer.train_step()
    trainer.out_of_patience(0.1)
    state = trainer.state()
    reference = after(state)
    trainer.train_step()
    trainer.out_of_patience(0.5)
    assert all(torch.equal(tensor, reference[name]) for name, tensor in flat(trainer.state()).items())
    for name in flat(state):
        if name != "rng":  # nothing draws from it so far
            changed = after(state, name)
            assert any(not torch.equal(tensor, reference[key]) for key, tensor in changed.items()), name


# command line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "65", "--n-latents", "64"], "--k must be between 1 and --n-latents 64; found 65"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--lr", "-1"], "--lr must not be negative"),
        (["--betas", "0.9", "1"], "--betas"),
        (["--keep", "0"], "--keep"),
        (["--norm", "batch"], "norm"),
    ],
)
def test_flags_out_of_range_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(TrainConfig, "", ["--batches", "b", "--out", "o", *flags])


def test_a_folder_of_another_kind_is_refused(batches: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder of kind batches, found activations"):
        run(config(batches.parent / "activations", tmp_path / "run"), ALONE)
    assert not (tmp_path / "run").exists()


def test_the_reference_preset_holds_the_settings_of_the_reference_run() -> None:
    """What of them other stages' flags set, the preset's comments give as command lines."""
    preset = Path(__file__).parent.parent / "configs" / "reference.toml"
    found = parse(TrainConfig, "", ["--config", str(preset), "--batches", "b", "--out", "o"])
    wanted: dict[str, Any] = {
        "architecture": "topk", "n_latents": 65_536, "k": 64, "aux_k": 2048, "aux_coefficient": 1 / 32, "norm": "layer",
        "batch_size": 8 * 1024, "epochs": 10, "lr": 5e-5, "lr_end": 1e-5, "betas": (0.85, 0.9999), "eps": 6.25e-10,
        "weight_decay": 0.01, "clip_norm": 0.0, "dead_after_tokens": 80_000 * 8192, "dtype": "float32",
    }  # fmt: skip
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert SAEConfig.norm_eps == 1e-6
    text = preset.read_text(encoding="utf-8")
    assert "layers.23.attn_norm" in text
    assert "--max-length 192" in text
    assert PreprocessConfig.validation_fraction == 0.05


def test_weights_and_biases_keeps_a_run_without_a_key(
    launch: Launch, batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself, offline: it leaves a run's file with the lines; with `off` it leaves nothing."""
    flags = ("--batches", batches, "--n-latents", 16, "--k", 2, "--batch-size", 60, "--max-steps", 3, "--log-every", 1)
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in a file there either
    for mode, n_runs in (("auto", 1), ("off", 0)):
        out = tmp_path / mode
        done = launch("-m", "sae.train", *flags, "--wandb", mode, "--out", out, limit=300)
        assert done.returncode == 0, done.stderr
        assert len(read_metrics(out)) == 3
        runs = [path.read_bytes() for path in out.rglob("*.wandb")]
        assert len(runs) == n_runs
        assert all(name in run for run in runs for name in (b"since_fired_histogram", b"activations_per_s", b"val_aux_loss"))


@pytest.mark.parametrize("norm", ["dataset", "layer", "none"])
def test_rows_without_variance_are_refused(norm: Any, tmp_path: Path) -> None:
    """Rows that differ by a factor alone are one row under `layer`; the other norms can tell them apart."""
    rows = torch.tensor([1.0, -1.0, 2.0]) * torch.arange(1.0, 91.0)[:, None]
    data = Batches(make_batches(tmp_path, rows))
    if norm == "layer":
        with pytest.raises(ValueError, match="rows are the same under --norm layer"):
            Trainer(Hyperparameters(**SMALL, norm=norm), ALONE, data)
    else:
        Trainer(Hyperparameters(**SMALL, norm=norm), ALONE, data)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("size", [1e-14, 1e14])
def test_rows_of_any_size_train_alike(size: float, flush: bool, tmp_path: Path) -> None:
    """On processors that take subnormal numbers for 0 too."""
    rows, _ = sparse_rows(150, 10, 30, active=3)
    found = []
    assert torch.set_flush_denormal(flush) or not flush
    try:
        for factor in (1.0, size):
            data = Batches(make_batches(tmp_path / f"{factor}", (rows + 0.5) * factor))
            trainer = Trainer(Hyperparameters(**SMALL), ALONE, data)
            for _ in range(2):
                result = trainer.train_step()
            x = data.train.read(0, 60)
            found.append((result.fvu, trainer.sae(x).detach() / factor))
    finally:
        torch.set_flush_denormal(False)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-2, atol=1e-2)


def test_initial_bias_is_the_mean_of_z(batches: Path) -> None:
    data = Batches(batches)
    trainer = Trainer(Hyperparameters(**SMALL), ALONE, data)
    z = trainer.sae.normalise(data.train.read(0, len(data.train))).z
    torch.testing.assert_close(trainer.sae.b_pre.detach(), z.mean(0), rtol=1e-4, atol=1e-5)


def test_initial_bias_may_be_the_geometric_median_of_z(batches: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_rows": 32, "validation_fraction": 0.1, "max_norm_ratio": 0, "median_rows": 10**6}
    preprocess(PreprocessConfig(activations=batches.parent / "activations", out=tmp_path / "out", **settings), ALONE)
    data = Batches(tmp_path / "out")
    for norm in ("dataset", "layer", "none"):
        trainer = Trainer(Hyperparameters(**SMALL, b_pre="geometric_median", norm=norm), ALONE, data)  # type: ignore[arg-type]
        z = trainer.sae.normalise(data.train.read(0, len(data.train))).z
        torch.testing.assert_close(trainer.sae.b_pre.detach(), geometric_median(z).float(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="--median-rows"):
        Trainer(Hyperparameters(**SMALL, b_pre="geometric_median"), ALONE, Batches(batches))

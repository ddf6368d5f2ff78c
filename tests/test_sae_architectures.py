"""The architectures beside TopK: each loss against its definition in dense matrices, what they select, and whole runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.cli import parse
from sae.architectures import names
from sae.batches import Batches
from sae.grid import read_runs
from sae.hyperparameters import Hyperparameters
from sae.loss import LossConfig, Losses
from sae.model import SAE, SAEConfig, load
from sae.parallel import global_batch_top_k
from sae.train import TrainConfig, run
from sae.trainer import Trainer
from tests.sae_folders import ALONE, make_batches, own_tensors, sparse_rows
from tests.sae_ranks import SMALL

PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def make_sae(architecture: str, **overrides: Any) -> SAE:
    """Every parameter away from its initial value, float64, d 12, 40 latents."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_model=12, n_latents=40, k=5, norm="none", architecture=architecture, **overrides)).double()
    sae.initialise_("tied", generator)
    with torch.no_grad():
        for name in ("b_enc", "b_pre", "W_enc", "W_dec"):
            for tensor in (sae.state_dict()[name],) if hasattr(sae, name) else ():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for tensor in own_tensors(sae):
            tensor += torch.rand(40, generator=generator, dtype=torch.float64)
    return sae


@pytest.fixture
def z() -> Tensor:
    return torch.randn(20, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows, _ = sparse_rows(900, 10, 30, active=3)
    return make_batches(tmp_path_factory.mktemp("rows"), rows, batch_rows=32)


def config(batches: Path, out: Path, **overrides: Any) -> TrainConfig:
    return TrainConfig(**{"batches": batches, "out": out, "wandb": "off", "log_every": 1} | SMALL | overrides)


def dense_h(sae: SAE, z: Tensor) -> Tensor:
    return (z - sae.b_pre) @ sae.W_enc.T + sae.b_enc


def same_gradients(sae: SAE, part: Losses, reference: Tensor) -> None:
    parameters = list(sae.parameters())
    ours = torch.autograd.grad(part.objective, parameters)
    for mine, twin in zip(ours, torch.autograd.grad(reference, parameters), strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-11, atol=1e-11)


def test_batchtopk_keeps_the_largest_of_the_whole_batch(z: Tensor) -> None:
    sae = make_sae("batchtopk")
    part, h = sae.losses(z, LossConfig(k=5)), dense_h(sae, z)
    smallest = h.detach().flatten().topk(5 * len(z)).values[-1]
    f = h * (h >= smallest)
    reference = (z - f @ sae.W_dec - sae.b_pre).square().sum()
    torch.testing.assert_close(part.objective, reference)
    assert part.l0 == 5 * len(z)
    assert part.threshold == smallest
    assert len({int(row) for row in (f > 0).sum(1)}) > 3
    same_gradients(sae, part, reference)


def test_batchtopk_finds_rows_that_hold_far_more_than_k() -> None:
    """One row holds all of the largest values: candidates per row must grow from 2 k to 40."""
    h = torch.rand(10, 100, generator=torch.Generator().manual_seed(0))
    h[3] += 5
    indices, kept, threshold = global_batch_top_k(h, 4, ALONE.mesh(1).data, ALONE.mesh(1).latent)
    assert int(kept[3].sum()) == 40 == int(kept.sum())
    assert set(indices[3][kept[3]].tolist()) == set(h[3].topk(40).indices.tolist())
    assert threshold == h[3].topk(40).values[-1]
    h.neg_()  # nothing is positive: nothing is kept
    assert not global_batch_top_k(h, 4, ALONE.mesh(1).data, ALONE.mesh(1).latent)[1].any()


def test_relu_penalises_with_the_norms_of_the_decoder(z: Tensor) -> None:
    sae = make_sae("relu")
    part, f = sae.losses(z, LossConfig(k=5, sparsity=0.3)), dense_h(sae, z).relu()
    penalty = sum(f[:, i].sum() * sae.W_dec[i].norm() for i in range(40))
    reference = (z - f @ sae.W_dec - sae.b_pre).square().sum() + 0.3 * 12 * penalty
    torch.testing.assert_close(part.objective, reference)
    same_gradients(sae, part, reference)


def test_jumprelu_moves_its_thresholds_by_the_kernel_estimate(z: Tensor) -> None:
    sae, width, weight = make_sae("jumprelu"), 0.3, 0.2
    part, h = sae.losses(z, LossConfig(k=5, sparsity=weight, bandwidth=width)), dense_h(sae, z)
    threshold = sae.threshold
    assert threshold is not None
    f = (h * (h > threshold)).detach().requires_grad_()
    error = z - f @ sae.W_dec - sae.b_pre
    assert part.main.item() == pytest.approx(error.square().sum().item())
    assert part.penalty == part.l0 == (h > threshold).sum()
    ours = dict(zip(("b_enc", "threshold"), torch.autograd.grad(part.objective, [sae.b_enc, threshold]), strict=True))
    (g,) = torch.autograd.grad(error.square().sum(), [f])
    expected = torch.zeros(40, dtype=torch.float64)
    h, threshold = h.detach(), threshold.detach()
    for row in range(len(z)):  # equations 11 and 12 of arXiv:2407.14435, entry by entry
        for i in range(40):
            inside = abs(float((h[row, i] - threshold[i]) / width)) < 0.5
            if inside:
                expected[i] -= (threshold[i] * g[row, i] / width + weight * 12 / width).item()
    assert expected.any()
    torch.testing.assert_close(ours["threshold"], expected)
    torch.testing.assert_close(ours["b_enc"], (g * (h > threshold)).sum(0))


def test_matryoshka_reconstructs_from_each_prefix(z: Tensor) -> None:
    ends = (8, 20, 40)
    sae = make_sae("matryoshka", prefixes=ends)
    part, h = sae.losses(z, LossConfig(k=5)), dense_h(sae, z)
    f = torch.zeros_like(h).scatter(1, h.topk(5).indices, 1.0) * h.relu()
    errors = [(z - f[:, :end] @ sae.W_dec[:end] - sae.b_pre).square().sum() for end in ends]
    reference = torch.stack(errors).mean()
    torch.testing.assert_close(part.objective, reference)
    torch.testing.assert_close(part.main, errors[-1])
    same_gradients(sae, part, reference)


def gates(sae: SAE, z: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations of the gates and of the magnitudes [N, n], section 3.2 of arXiv:2404.16014, path by path."""
    centred, W_mag = z - sae.b_pre, sae.W_enc * sae.r_mag.exp()[:, None]
    return centred @ sae.W_enc.T + sae.b_gate, centred @ W_mag.T + sae.b_mag


def test_gated_trains_gates_by_their_own_reconstruction(z: Tensor) -> None:
    sae, weight = make_sae("gated"), 0.3
    part, (gate, magnitude) = sae.losses(z, LossConfig(k=5, sparsity=weight)), gates(sae, z)
    f = (gate > 0) * magnitude.relu()
    assert 0 < int((f > 0).sum()) < int((gate > 0).sum())
    main = (z - f @ sae.W_dec - sae.b_pre).square().sum()
    aux = (z - gate.relu() @ sae.W_dec.detach() - sae.b_pre.detach()).square().sum()
    penalty = gate.relu().sum()
    assert part.l0 == (f > 0).sum()
    assert torch.equal(part.fired, (f > 0).sum(0, dtype=torch.int32))
    for found, expected in ((part.main, main), (part.aux, aux), (part.penalty, penalty)):
        torch.testing.assert_close(found, expected)
    same_gradients(sae, part, main + aux + 12 * weight * penalty)


def test_gated_encodes_with_the_gradients_of_its_definition(z: Tensor) -> None:
    sae = make_sae("gated")
    gate, magnitude = gates(sae, z)
    reference = ((gate > 0) * magnitude.relu()) @ sae.W_dec + sae.b_pre
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = [parameter for name, parameter in sae.named_parameters() if name != "b_gate"]  # a step has no gradient
    ours = torch.autograd.grad((sae(z) * weight).sum(), parameters)
    for mine, twin in zip(ours, torch.autograd.grad((reference * weight).sum(), parameters), strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("architecture", names())
def test_encode_selects_what_the_definition_says(architecture: str, z: Tensor) -> None:
    prefixes = {"prefixes": (20, 40)} if architecture == "matryoshka" else {}
    sae = make_sae(architecture, **prefixes).requires_grad_(False)
    h_bias = torch.zeros(40, dtype=torch.float64)
    h_bias[7] = 100.0
    for bias in (None, h_bias):
        if architecture == "gated":
            gate, h = gates(sae, z)
            added = torch.zeros(40, dtype=torch.float64) if bias is None else bias
            f = (h + added).relu() * (gate + added / sae.r_mag.exp() > 0)
        else:
            h = dense_h(sae, z) + (0 if bias is None else bias)
            f = h * (h > getattr(sae, "threshold", torch.zeros(40)))
        if architecture in ("topk", "matryoshka"):
            f = h.relu() * torch.zeros_like(h).scatter(1, h.topk(5).indices, 1.0)
        latents = sae.encode(z, bias)
        torch.testing.assert_close(torch.zeros_like(h).scatter_add(1, latents.indices, latents.values), f)
        torch.testing.assert_close(sae(z, bias), f @ sae.W_dec + sae.b_pre)
        if architecture not in ("topk", "matryoshka"):
            assert latents.values.shape[1] == (f > 0).sum(1).max()
    assert (sae.encode(z, h_bias).indices[:, 0] == 7).all()


@pytest.mark.parametrize("architecture", names())
def test_each_architecture_trains_saves_and_continues_to_the_bit(architecture: str, batches: Path, tmp_path: Path) -> None:
    settings = {"architecture": architecture, "epochs": 6, "matryoshka": (0.25, 1.0), "sparsity": 3e-3, "lr": 1e-2}
    settings |= {"checkpoint_every": 30, "norm": "dataset", "log_every": 20}
    for out in ("clean", "cut"):
        run(config(batches, tmp_path / out, **settings), ALONE)
        if out == "cut":  # its end is lost: it goes back to its newest checkpoint
            for path in (tmp_path / out / "sae").iterdir():
                path.unlink()
            run(config(batches, tmp_path / out, **settings), ALONE)
    sae, again = load(tmp_path / "clean" / "sae"), load(tmp_path / "cut" / "sae")
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))
    x = Batches(batches).validation.read(0, 64)
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(fvu) < 0.5
    l0 = float((sae.encode(x).values > 0).sum(1).float().mean())
    assert l0 <= 3 if architecture in ("topk", "matryoshka") else sae.cfg.k / 2 < l0 < 2 * sae.cfg.k


def test_accumulating_parts_of_a_step_changes_nothing_but_the_order_of_sums(batches: Path) -> None:
    whole, parts = (
        Trainer(Hyperparameters(**SMALL | {"dtype": "float64", "accumulate": n}), ALONE, Batches(batches)) for n in (1, 7)
    )
    for _ in range(5):
        a, b = whole.train_step(), parts.train_step()
        assert a.loss == pytest.approx(b.loss, rel=1e-12)
    assert torch.equal(whole.last_fired, parts.last_fired)
    for mine, theirs in zip(whole.sae.parameters(), parts.sae.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_k_falls_to_its_last_value_and_a_run_continues_on_its_way(batches: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"k_start": 12, "k_anneal_steps": 9, "epochs": 2}
    assert [Hyperparameters(**SMALL | settings).k_at(step) for step in (0, 1, 3, 8, 9, 99)] == [12, 11, 9, 4, 3, 3]
    assert Hyperparameters(**SMALL).k_at(0) == 3
    out = tmp_path / "run"
    run(config(batches, out, **settings, checkpoint_every=4), ALONE)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [math.ceil(lines[step]["l0"]) for step in (0, 1, 3, 8, 9)] == [12, 11, 9, 4, 3]
    whole = load(out / "sae")
    assert whole.cfg.k == 3
    for path in (out / "sae").iterdir():  # its end is lost: it goes back to its newest checkpoint
        path.unlink()
    run(config(batches, out, **settings, checkpoint_every=4), ALONE)
    assert load(out / "sae").weights_hash == whole.weights_hash


def test_patience_ends_a_run_that_gains_nothing(batches: Path, tmp_path: Path) -> None:
    run(config(batches, tmp_path / "run", lr=1e-12, patience=2, validate_every=2), ALONE)
    done = load(tmp_path / "run" / "sae").cfg.provenance["training_steps"]
    assert done < Trainer(Hyperparameters(**SMALL), ALONE, Batches(batches)).total_steps
    with pytest.raises(ValueError, match="--patience 2 needs --validate-every"):
        config(batches, tmp_path / "run", patience=2)


def test_a_run_begins_with_the_weights_of_another(batches: Path, tmp_path: Path) -> None:
    run(config(batches, tmp_path / "first"), ALONE)
    first = load(tmp_path / "first" / "sae")
    trainer = Trainer(Hyperparameters(**SMALL), ALONE, Batches(batches), begin_with=first)
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in trainer.sae.state_dict().items())
    run(config(batches, tmp_path / "second", init_from=tmp_path / "first" / "sae", max_steps=2), ALONE)
    with pytest.raises(ValueError, match="--init-from: has n_latents 96, but this run needs 50"):
        run(config(batches, tmp_path / "third", init_from=tmp_path / "first" / "sae", n_latents=50), ALONE)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid(path: Path) -> None:
    rows = ["--model", "m", "--corpus", "c"] if path.stem == "streaming" else ["--batches", "b"]
    found = parse(TrainConfig, "", [*(["--runs"] if path.stem == "runs" else ["--config"]), str(path), *rows, "--out", "o"])
    if found.runs:
        assert len(read_runs(found, found.runs)) > 1
        return
    assert found.batch_size % 1024 == 0
    assert math.isfinite(found.peak_lr)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"matryoshka": (0.5,), "architecture": "matryoshka"}, "end with 1"), ({"accumulate": 0}, "--accumulate must be at"),
     ({"k_start": 2}, "--k-start must lie between --k 3 and"), ({"sparsity": -1.0}, "--sparsity must not be negative"),
     ({"jump_bandwidth": 0.0}, "--jump-bandwidth")],
)  # fmt: skip
def test_flags_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hyperparameters(**SMALL | change)

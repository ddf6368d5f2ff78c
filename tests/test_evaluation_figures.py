"""The parts of an evaluation against their slow twins, and baselines against what theory says of them."""

from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from core.norms import unit_rows
from llama3 import load_model
from llama3.sites import LAYER_SITES
from sae.accumulator import Accumulator
from sae.evaluate import name_of
from sae.evaluating import bootstrap, splicing
from sae.evaluating.bootstrap import groups_of, interval, intervals
from sae.evaluating.contenders import of_sae, random_sae
from sae.evaluating.figures import density_histogram, figures_of, measures
from sae.evaluating.splicing import Spliced, losses
from sae.evaluating.weights import max_cosines, weight_figures
from sae.model import SAE, SAEConfig, best_encoder_norm
from tests.tiny import tiny_llama


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def value(accumulated: Accumulator, name: str) -> float:
    return figures_of(accumulated, 0, 0)[name].value


def reconstructed(x: Tensor, x_hat: Tensor, parts: int = 3) -> Accumulator:
    """Taken in part by part, merged."""
    whole = Accumulator.none(x.shape[1], 0, 0)
    for block, of_block in zip(x.tensor_split(parts), x_hat.tensor_split(parts), strict=True):
        part = Accumulator.none(x.shape[1], 0, 0)
        part.add_reconstruction(block, of_block)
        whole.merge(part)
    return whole


def test_mean_explains_nothing_and_identity_everything() -> None:
    x = 5 + rows(300, 6) * torch.arange(1, 7)
    assert value(reconstructed(x, x.double().mean(0).expand_as(x)), "explained_variance") == pytest.approx(0, abs=1e-12)
    identity = figures_of(reconstructed(x, x), 0, 0)
    for name in ("explained_variance", "explained_variance_legacy", "cosine", "l2_ratio", "relative_reconstruction_bias"):
        assert identity[name].value == pytest.approx(1, abs=1e-12), name
    assert identity["fvu"].value == identity["mse"].value == 0


def test_variance_is_about_the_mean_of_all_parts_and_the_legacy_formula_is_not() -> None:
    """Two parts far apart: their own means hide what the whole set's mean shows."""
    x = torch.cat((rows(200, 4), 100 + rows(200, 4, 1)))
    x_hat = x + 0.5 * rows(400, 4, 2)
    found = reconstructed(x, x_hat, parts=2)
    residual, spread = (x - x_hat).square().sum(), (x - x.mean(0)).square().sum()
    assert value(found, "fvu") == pytest.approx(float(residual / spread), rel=1e-5)
    legacy = [
        1 - (r - h).square().sum() / (r - part.mean(0)).square().sum()
        for part, hat in zip(x.split(200), x_hat.split(200), strict=True)
        for r, h in zip(part, hat, strict=True)
    ]
    assert value(found, "explained_variance_legacy") == pytest.approx(float(torch.stack(legacy).mean()), rel=1e-5)


@pytest.mark.parametrize(("n", "k"), [(2048, 32), (512, 16)])
def test_a_random_sae_leaves_what_theory_says(n: int, k: int) -> None:
    """On rows of independent entries `1 / (1 + a)` with rows of the best norm, `1 - a (1 - a)` with unit rows: a = k m / d, m
    being the mean square of the k largest of n standard normals (see `best_encoder_norm`).
    """
    d = 256
    sae = SAE(SAEConfig(d_model=d, n_latents=n, k=k, norm="none")).requires_grad_(False)
    x = rows(1500, d)
    expected = best_encoder_norm(n, k, d)
    found = Accumulator.none(d, n, k)
    x_hat, latents = of_sae("random", random_sae(sae, 1)).reconstruct(x)
    found.add_reconstruction(x, x_hat, latents)
    assert value(found, "fvu") == pytest.approx(expected, rel=0.02)
    a = 1 / expected - 1
    unit = SAE(SAEConfig(d_model=d, n_latents=n, k=k, norm="none")).requires_grad_(False)
    unit.initialise_("tied", torch.Generator().manual_seed(1))
    assert value(reconstructed(x, unit(x)), "fvu") == pytest.approx(1 - a * (1 - a), rel=0.03)


def test_figures_of_latents_are_those_counted() -> None:
    sae = SAE(SAEConfig(d_model=8, n_latents=40, k=4, norm="none")).requires_grad_(False)
    x, groups = rows(300, 8), torch.arange(300) % 7
    sentences = torch.arange(300) // 10  # a group has several, a sentence is of one document in truth
    groups = sentences % 7
    latents = sae.encode(x)
    found = Accumulator.none(8, 40, 4, n_groups=7)
    found.add_reconstruction(x, sae.decode(latents), latents, groups, sentences)
    dense = torch.zeros(300, 40).scatter_add_(1, latents.indices, latents.values)
    active = dense > 0
    assert found.firing_counts.tolist() == active.sum(0).tolist()
    assert found.total("fired_sentences").tolist() == active.view(30, 10, 40).any(1).sum(0).tolist()
    for group in range(7):
        assert found.sums["fired"][group].tolist() == active[groups == group].sum(0).tolist()
    l0, density = active.sum(1).sort().values, active.double().mean(0)
    figures = figures_of(found, 0, 0)
    assert figures["l0"].value == pytest.approx(float(l0.double().mean()))
    assert (figures["l0_p10"].value, figures["l0_p90"].value) == (l0[29], l0[269])
    assert figures["dead_fraction"].value == pytest.approx(float((density == 0).double().mean()))
    assert figures["over_10_percent"].value == float((density > 0.1).double().mean()) > 0
    assert figures["firing_over_10_percent"].value == pytest.approx(float(density[density > 0.1].sum() / density.sum()))
    assert figures["density"].value == pytest.approx(
        float(density[density > 0].sort().values[(int((density > 0).sum()) - 1) // 2])
    )
    assert figures["l1"].value == pytest.approx(float(dense.sum(1).mean()), rel=1e-5)
    assert sum(density_histogram(found)) == int((density > 0).sum())


def test_intervals_are_percentiles_over_resampled_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin draws documents and computes the figure anew from their rows."""
    monkeypatch.setattr(bootstrap, "BLOCK", 7)
    x, documents = rows(400, 5) + torch.arange(400)[:, None] % 20, torch.arange(400) % 20
    x_hat = x + rows(400, 5, 1) * (1 + documents[:, None] / 4)
    found = Accumulator.none(5, 0, 0, n_groups=20)
    found.add_reconstruction(x, x_hat, groups=documents)
    drawn = torch.randint(20, (60, 20), generator=torch.Generator().manual_seed(3))
    fvu = []
    for resample in drawn:
        chosen = torch.cat([(documents == document).nonzero()[:, 0] for document in resample])
        centred = x[chosen].double() - x[chosen].double().mean(0)
        fvu.append((x - x_hat)[chosen].double().square().sum() / centred.square().sum())
    bounds = intervals(found.sums, measures, 60, 3)
    low, high = interval(value(found, "fvu"), torch.stack(fvu)) or (0.0, 0.0)
    assert bounds["fvu"] == pytest.approx((low, high), rel=1e-6)
    assert low < value(found, "fvu") < high


def test_an_interval_is_moved_by_the_resamples_bias() -> None:
    """Where half of the resamples lie below the figure, plain percentiles; otherwise further to the figure's side."""
    resampled = torch.arange(1, 1001, dtype=torch.float64)
    assert interval(500.5, resampled) == pytest.approx((25.975, 975.025), abs=0.01)
    low, high = interval(400.5, resampled) or (0.0, 0.0)
    z0 = NormalDist().inv_cdf(0.4)
    levels = [NormalDist().cdf(2 * z0 + z) for z in (-1.959964, 1.959964)]
    assert (low, high) == pytest.approx([1 + 999 * level for level in levels], abs=0.01)
    assert low < 25.9
    assert interval(0.5, resampled) is None, "the resamples say nothing of this figure"
    assert interval(5.0, torch.tensor([5.0] * 9)) == (5, 5)
    assert interval(5.0, torch.tensor([5.0, torch.nan, 5.0])) is None


def test_few_documents_have_no_interval() -> None:
    found = Accumulator.none(5, 0, 0, n_groups=9)
    found.add_reconstruction(rows(90, 5), rows(90, 5, 1), groups=torch.arange(90) % 9)
    assert set(intervals(found.sums, measures, 50, 0).values()) == {None}


def test_documents_are_put_into_groups() -> None:
    assert groups_of(torch.tensor([70, 3, 3, 900])).tolist() == [1, 0, 0, 2]
    many = groups_of(torch.arange(1000))
    assert torch.bincount(many).tolist() == [10] * 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(tiny_llama(tmp_path_factory.mktemp("model"), seed=5))


@pytest.mark.parametrize("site", ["embed", *(f"layers.1.{name}" for name in LAYER_SITES), "layers.0.resid_post", "final_norm"])
@torch.inference_mode()
def test_a_resumed_pass_is_the_whole_pass_with_a_hook(model: Any, site: str) -> None:
    tokens = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    spliced = Spliced(model, site, tokens)
    x = model.capture(tokens, [site])[site]
    assert torch.equal(spliced.x, x)
    torch.testing.assert_close(model.output(spliced.hidden), model(tokens))
    where = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    given = rows(int(where.sum()), x.shape[-1])
    edited = x.clone()
    edited[where] = given
    with model.hooks({site: lambda x: edited}):
        expected = model(tokens)
    torch.testing.assert_close(model.output(spliced.replaced(where, given)), expected)
    torch.testing.assert_close(spliced.x, x)


@torch.inference_mode()
def test_losses_in_blocks_are_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splicing, "CPU_ELEMENTS", 7 * 50)
    head = rows(50, 8).T
    clean, other, targets = rows(33, 8, 1), rows(33, 8, 2), torch.arange(33) % 50
    ce_clean, found = losses(lambda x: x @ head, clean, {"other": other, "same": clean}, targets)
    log_p, log_q = (clean @ head).double().log_softmax(1), (other @ head).double().log_softmax(1)
    each = torch.arange(33)
    torch.testing.assert_close(ce_clean.double(), -log_p[each, targets], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["other"][0].double(), -log_q[each, targets], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["other"][1].double(), (log_p.exp() * (log_p - log_q)).sum(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found["same"][1], torch.zeros(33))
    nothing, empty = losses(lambda x: x @ head, clean[:0], {"other": other[:0]}, targets[:0])
    assert len(nothing) == len(empty["other"][0]) == 0


def test_figures_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.evaluating.weights.CPU_ELEMENTS", 30)
    sae = SAE(SAEConfig(d_model=6, n_latents=20, k=4)).requires_grad_(False)
    sae.W_enc.copy_(rows(20, 6, 4))
    sae.b_enc.copy_(rows(20, 1, 5)[:, 0])
    found = weight_figures(sae)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(found.encoder_decoder_cosine, cosine(sae.W_enc, sae.W_dec))
    torch.testing.assert_close(found.encoder_norm, sae.W_enc.norm(dim=1))
    torch.testing.assert_close(found.encoder_bias, sae.b_enc)
    for weight, nearest in ((sae.W_enc, found.max_encoder_cosine), (sae.W_dec, found.max_decoder_cosine)):
        cosines = cosine(weight[:, None], weight[None], dim=2).fill_diagonal_(-2)
        torch.testing.assert_close(nearest, cosines.amax(1))
    assert max_cosines(unit_rows(rows(1, 6))).isnan().all()


@pytest.mark.parametrize(
    ("path", "others", "name"),
    [
        ("runs/a/sae", ["runs/b/sae"], "a"),
        ("x/a/sae", ["y/a/sae", "y/b/sae"], "x/a"),
        ("sae", [], "sae"),
        ("a", ["b/a"], "a"),
    ],
)
def test_columns_are_named_by_what_tells_folders_apart(path: str, others: list[str], name: str) -> None:
    assert name_of(Path(path), [Path(other) for other in others]) == name

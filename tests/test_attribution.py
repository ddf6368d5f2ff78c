"""Attribution and ablation against slow twins: finite differences, dense SAEs, one feature at a time."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.artifact import verify
from interpretability import attribute as stage
from interpretability.attribute import AttributeConfig
from interpretability.causal.ablation import Cut, ablated
from interpretability.causal.agreement import ranks, spearman, spearman_interval
from interpretability.causal.attribution import Nodes, attribute, by_latent, gradients, trained_on
from interpretability.causal.objectives import Divergence, LogitDifference, Objective
from interpretability.causal.records import read_attribution, read_suite
from llama3 import Transformer, load_model, load_tokenizer
from sae.model import SAE, load
from tests.interp_folders import solo
from tests.tiny import tiny_llama
from tests.tiny_features import Features, tiny_sae, write_features

DEMO = Path(__file__).parent.parent / "demo"
SITES = ("layers.0.attn_norm", "layers.1.resid_post")
PROMPT = "the storm tore the roof from the barn"
OBJECTIVES = (LogitDifference(3, 7), LogitDifference(3), Divergence(outcomes=40))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> list[Features]:
    """Two SAEs at two sites of one model, the second with a scale of its own for each row."""
    root = tmp_path_factory.mktemp("attribution")
    model = tiny_llama(root / "model")
    saes = [tiny_sae(model, SITES[0]), tiny_sae(model, SITES[1], seed=1, norm="layer")]
    return [write_features(root / str(i), model, sae) for i, sae in enumerate(saes)]


@pytest.fixture(scope="module")
def doubles(features: list[Features]) -> tuple[Transformer, list[SAE], Tensor]:
    """The same in float64, and a prompt."""
    model = load_model(str(features[0].model), dtype=torch.float64).eval()
    ids = load_tokenizer(str(features[0].model)).encode_prompt(PROMPT)
    return model, [load(found.sae, dtype=torch.float64) for found in features], torch.tensor(ids)


def changed(model: Transformer, saes: list[SAE], tokens: Tensor, node: Nodes, by: float) -> Tensor:
    """(V,) next-token logits with the activation of one node times `1 + by`; the SAE's reconstruction in full, as a twin."""
    sae = saes[int(node.sae)]

    def edit(x: Tensor) -> Tensor:
        norm = sae.normalise(x[0])
        values = torch.zeros(x.shape[1], sae.cfg.n_latents, dtype=sae.W_dec.dtype)
        found = sae.encode(x[0])
        values.scatter_add_(1, found.indices, found.values)
        before = values @ sae.W_dec
        values[node.position, node.latent] *= 1 + by
        return x + ((values @ sae.W_dec - before) / norm.scale).to(x.dtype)

    with torch.no_grad(), model.hooks({sae.site: edit}):
        return model(tokens[None])[0, -1].double()


def clean_logits(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens[None])[0, -1].double()


def singles(nodes: Nodes, n: int | None = None) -> list[Nodes]:
    order = nodes.effect.abs().argsort(descending=True)[:n]
    return [nodes.take(place[None]) for place in order]


def check_finite_differences(model: Transformer, saes: list[SAE], tokens: Tensor, objective: LogitDifference, n: int) -> None:
    found = attribute(model, saes, tokens, objective)
    h = 0.02  # rotary positions are float32 in every model, so a smaller step would measure their rounding
    for node in singles(found.nodes, n):

        def slope(step: float, node: Nodes = node) -> float:
            up, down = (objective.scores(changed(model, saes, tokens, node, by)[None])[0] for by in (step, -step))
            return float(up - down) / (2 * step)

        # Without the term of third order (Richardson).
        assert float(node.effect) == pytest.approx((4 * slope(h) - slope(2 * h)) / 3, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_attribution_is_the_derivative(doubles: tuple[Transformer, list[SAE], Tensor], objective: LogitDifference) -> None:
    """Every node of both SAEs, in float64."""
    model, saes, tokens = doubles
    check_finite_differences(model, saes, tokens, objective, 10_000)


def test_attribution_is_the_derivative_on_the_embedded_model() -> None:
    tokenizer = load_tokenizer("demo")
    model, sae = load_model("demo", dtype=torch.float64).eval(), load(DEMO / "sae", dtype=torch.float64)
    tokens = torch.tensor(tokenizer.encode_prompt("He said that he did not go to the war, because the king"))
    answers = [tokenizer.encode(text)[0] for text in (" had", " is")]
    check_finite_differences(model, [sae], tokens, LogitDifference(*answers), 25)


def test_divergence_is_the_second_order_of_a_coarser_kl(doubles: tuple[Transformer, list[SAE], Tensor]) -> None:
    model, saes, tokens = doubles
    objective = Divergence(outcomes=40)
    found = attribute(model, saes, tokens, objective)
    clean = clean_logits(model, tokens)
    likeliest = clean.topk(40).indices

    def coarse(logits: Tensor) -> Tensor:
        p = logits.softmax(0)
        return torch.cat((p[likeliest], (1 - p[likeliest].sum())[None]))

    h = 1e-2
    for node in singles(found.nodes, 40):
        kls, full = [], []
        for by in (h, -h):
            after = changed(model, saes, tokens, node, by)
            kls.append(float((coarse(clean) * (coarse(clean) / coarse(after)).log()).sum()))
            full.append(float(objective.measured(clean, after[None])[0]))
        # The mean of both sides has no third order.
        assert float(node.effect) == pytest.approx(sum(kls) / 2 / h**2, rel=1e-3, abs=1e-9)
        assert float(node.effect) <= 1.01 * sum(full) / 2 / h**2


def test_attribution_is_exact_where_the_rest_is_linear(features: list[Features]) -> None:
    """At final_norm the logits are linear: what is predicted is what ablation finds."""
    model = load_model(str(features[0].model), dtype=torch.float64).eval()
    sae = tiny_sae(features[0].model, "final_norm").double()
    tokens = torch.tensor(load_tokenizer(str(features[0].model)).encode_prompt(PROMPT))
    objective = LogitDifference(3, 7)
    nodes = attribute(model, [sae], tokens, objective).nodes
    difference = model.output.weight[3] - model.output.weight[7]
    last = nodes.take(nodes.position == len(tokens) - 1)
    by_hand = last.activation * last.unit * (sae.W_dec[last.latent] @ difference)
    torch.testing.assert_close(last.effect, by_hand)
    torch.testing.assert_close(ablated(model, tokens, [Cut(sae, node) for node in singles(last)], objective, 8),
                               torch.cat([node.effect for node in singles(last)]))  # fmt: skip
    assert float(nodes.take(nodes.position < len(tokens) - 1).effect.abs().max()) == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ablation_against_one_at_a_time(doubles: tuple[Transformer, list[SAE], Tensor], objective: Objective) -> None:
    model, saes, tokens = doubles
    nodes = singles(attribute(model, saes, tokens, objective).nodes, 50)
    assert {int(node.sae) for node in nodes} == {0, 1}
    clean = clean_logits(model, tokens)
    twin = torch.cat([objective.measured(clean, changed(model, saes, tokens, node, -1)[None]) for node in nodes])
    cuts = [Cut(saes[int(node.sae)], node) for node in nodes]
    for rows in (2, 7, 64):
        torch.testing.assert_close(ablated(model, tokens, cuts, objective, rows), twin, rtol=1e-4, atol=1e-6)
    assert len(ablated(model, tokens, [], objective, 8)) == 0


def test_a_latent_is_taken_out_everywhere(doubles: tuple[Transformer, list[SAE], Tensor]) -> None:
    model, saes, tokens = doubles
    objective = LogitDifference(3, 7)
    nodes = attribute(model, saes, tokens, objective).nodes
    (number, latent), places = max(by_latent(nodes).items(), key=lambda item: len(item[1]))
    assert len(places) > 1
    sae = saes[number]

    def without(x: Tensor) -> Tensor:
        found = sae.encode(x[0])
        values = found.values * (found.indices == latent) * trained_on(sae, x[0], "none")[:, None]
        return x - values.sum(1)[None, :, None] * sae.W_dec[latent] / sae.normalise(x).scale

    with torch.no_grad(), model.hooks({sae.site: without}):
        after = model(tokens[None])[0, -1].double()
    twin = objective.measured(clean_logits(model, tokens), after[None])
    torch.testing.assert_close(
        ablated(model, tokens, [Cut(sae, nodes.take(places))], objective, 2), twin, rtol=1e-6, atol=1e-10
    )


def test_the_forward_pass_is_unchanged(features: list[Features]) -> None:
    """Bit by bit in float32, with SAEs at two sites; gradients that a caller asked for stay as they are."""
    model = load_model(str(features[0].model)).eval()
    tokens = torch.tensor(load_tokenizer(str(features[0].model)).encode_prompt(PROMPT))
    with torch.enable_grad():
        plain = model(tokens[None], last_only=True)[0, -1].detach().double()
    found = gradients(model, tokens, SITES, LogitDifference(3, 7))
    assert torch.equal(found.logits[0], plain)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_features_in_one_pass(features: list[Features], objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 32 tokens, two sites: passes forward and back are counted."""
    model = load_model(str(features[0].model)).eval()
    saes = [load(found.sae) for found in features]
    passes = {"forward": 0, "back": 0}
    model.register_forward_hook(lambda *_: passes.update(forward=passes["forward"] + 1))
    grad = torch.autograd.grad

    def counted(*args: object, **kwargs: object) -> object:
        passes["back"] += 1
        return grad(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", counted)
    tokens = torch.tensor((load_tokenizer(str(features[0].model)).encode_prompt(PROMPT) * 2)[:32])
    assert len(tokens) == 32
    nodes = attribute(model, saes, tokens, objective).nodes
    assert passes == {"forward": 1, "back": 1}
    assert len(nodes.latent) == 6 * 2 * 32


def test_positions_that_the_sae_was_not_trained_on(features: list[Features]) -> None:
    sae, x = load(features[0].sae), torch.ones(4, 32)
    x[2] *= 100
    assert trained_on(sae, x, "none").tolist() == [True, True, True, True]
    assert trained_on(sae, x, "feed").tolist() == [False, True, True, True]
    sae.cfg.provenance["max_norm"] = 10.0
    assert trained_on(sae, x, "none").tolist() == [True, True, False, True]
    sae.cfg.provenance["bos"] = "feed"
    assert trained_on(sae, x, "feed").tolist() == [False, True, False, True]
    del sae.cfg.provenance["bos"]
    assert trained_on(sae, x, "none").tolist() == [False, True, False, True]


def test_ranks_and_their_correlation() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 6, (2, 30)).astype(float)
        slow = [1 + sum(y < x for y in a) + (sum(y == x for y in a) - 1) / 2 for x in a]
        assert ranks(a).tolist() == slow
        rho = np.cov(ranks(a), ranks(b))[0, 1] / np.sqrt(np.var(ranks(a), ddof=1) * np.var(ranks(b), ddof=1))
        assert spearman(a, b) == pytest.approx(rho)
    assert spearman(np.arange(5.0), np.exp(np.arange(5.0))) == pytest.approx(1)
    assert spearman(np.ones(5), np.arange(5.0)) is None
    assert spearman(np.arange(2.0), np.arange(2.0)) is None
    x = generator.normal(size=200)
    found = spearman_interval(x, x + generator.normal(size=200), 500, 0)
    assert found is not None
    assert 0.5 < found.low < found.value < found.high < 0.85
    assert spearman_interval(np.ones(5), np.arange(5.0), 10, 0) is None


def config(features: list[Features], out: Path, **flags: object) -> AttributeConfig:
    folders = {name: tuple(getattr(found, name) for found in features) for name in ("sae", "top", "explanations")}
    given: dict[str, object] = {"model": str(features[0].model), "prompt": PROMPT, "answer": "a", "baseline": "e", "out": out}
    return AttributeConfig(**(given | folders | flags))  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["position", "everywhere"])
def test_the_stage(features: list[Features], tmp_path: Path, where: str) -> None:
    stage.run(config(features, tmp_path / "a", ablate=where), solo())
    stage.run(config(features, tmp_path / "b", ablate=where), solo())
    assert verify(tmp_path / "a").kind == "attribution"
    for name in ("attribution.json", "attributions.parquet", "attribution.md", "attribution.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    found = read_attribution(tmp_path / "a")
    assert "".join(found["tokens"]) == f"<|begin_of_text|>{PROMPT}"
    assert all(0 not in row["positions"] for row in found["grid"]), "BOS was never trained on"
    assert [sae["site"] for sae in found["saes"]] == list(SITES)
    assert len(found["features"]) == 20
    sizes = [abs(row["attribution"]) for row in found["features"]]
    assert sizes == sorted(sizes, reverse=True)
    for row in found["features"]:
        assert row["attribution"] == pytest.approx(sum(row["attributions"]))
        assert len(row["positions"]) == 1 or where == "everywhere"
    predicted, measured = (np.array([row[name] for row in found["features"]]) for name in ("attribution", "effect"))
    assert found["spearman"] == spearman(predicted, measured)
    assert found["spearman"] > 0.5
    assert f"{found['spearman']:.3f}" in (tmp_path / "a" / "attribution.md").read_text()
    stage.run(config(features, tmp_path / "a", ablate=where), solo())  # complete: nothing to do


def test_a_whole_distribution_needs_no_answer(features: list[Features], tmp_path: Path) -> None:
    stage.run(config(features[:1], tmp_path / "a", answer="", baseline="", top=(), explanations=()), solo())
    found = read_attribution(tmp_path / "a")
    assert found["objective"] == {"kind": "distribution", "unit": "nats"}
    assert all(row["effect"] >= 0 and row["attribution"] >= 0 and row["title"] == "" for row in found["features"])


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ({"answer": " sad"}, "--answer ' sad': expected one token"),
        ({"baseline": "xyz"}, "--baseline 'xyz': expected one token, found 3"),
        ({"answer": "", "baseline": "e"}, "--baseline: there is no --answer"),
        ({"baseline": "a"}, "--answer itself"),
        ({"prompt": " "}, "--prompt is empty"),
        ({"prompt": "x" * 500}, "but the context holds 128"),
        ({"n": 0}, "--n must be at least 1"),
        ({"top": (Path("one"),)}, "--top: expected one for each of 2 --sae"),
    ],
)
def test_bad_input(features: list[Features], tmp_path: Path, flags: dict[str, object], fragment: str) -> None:
    with pytest.raises(ValueError, match=r"^.+$") as error:
        stage.run(config(features, tmp_path / "a", **flags), solo())
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def broken(features: list[Features], tmp_path: Path, change: Callable[[SAE], None]) -> list[Features]:
    sae = load(features[0].sae)
    change(sae)
    sae.save(tmp_path / "sae")
    return [features[0]._replace(sae=tmp_path / "sae")]


def test_an_sae_of_another_site_or_model_is_named(features: list[Features], tmp_path: Path) -> None:
    def elsewhere(sae: SAE) -> None:
        sae.cfg.provenance["site"] = "layers.9.resid_post"

    def stranger(sae: SAE) -> None:
        sae.cfg.provenance["model_hash"] = "another"

    for number, (change, fragment) in enumerate(((elsewhere, "layers.9.resid_post"), (stranger, "'another'"))):
        folder = tmp_path / str(number)
        wrong = broken(features, folder, change)
        with pytest.raises(ValueError, match=fragment):
            stage.run(config(wrong, folder / "out", top=(), explanations=()), solo())


def test_no_active_feature_and_no_finite_gradient_are_named(features: list[Features], tmp_path: Path) -> None:
    silent = load(features[0].sae)
    silent.b_enc.fill_(-1e6)
    model = load_model(str(features[0].model)).eval()
    tokens = torch.arange(5)
    with pytest.raises(ValueError, match=r"no feature of the SAE at layers\.0\.attn_norm"):
        attribute(model, [silent], tokens, LogitDifference(3, 7))
    silent.save(tmp_path / "sae")
    with pytest.raises(ValueError, match="no feature of the SAE"):
        stage.run(config([features[0]._replace(sae=tmp_path / "sae")], tmp_path / "out", top=(), explanations=()), solo())
    assert not (tmp_path / "out").exists()
    model.output.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"the gradient at layers\.1\.resid_post is not finite"):
        attribute(model, [load(features[1].sae)], tokens, LogitDifference(3, 7))


def test_the_suite() -> None:
    suite = read_suite()
    assert len(suite) >= 60
    assert len({row.prompt for row in suite}) == len(suite)
    assert {row.kind for row in suite} == {"facts", "emotions", "agreement", "lists", "code"}
    for row in suite:
        assert row.answer != row.baseline
        assert row.intermediate
        assert all(word == word.lower() and word != row.answer.strip().lower() for word in row.intermediate)
    kinds = [kind for kind, _ in itertools.groupby(suite, key=lambda row: row.kind)]
    assert len(kinds) == 5, "those of a kind stand together"

"""Steerability: every latent turned up, against the obvious pass a latent; what search and report make of it; validation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from core.artifact import building, verify
from interpretability import report, search
from interpretability import steerability as stage
from interpretability.causal.records import MEASURES, Steerability, SteeredFeature, read_steerability, read_steered
from interpretability.causal.turned_up import CONFIDENT_TOKENS, Latents
from interpretability.causal.validation import validate
from interpretability.evidence.promoted import promoted_by
from interpretability.report import ReportConfig
from interpretability.search import SearchConfig
from interpretability.steerability import SteerabilityConfig
from llama3 import load_model, load_tokenizer
from sae.model import load
from tests.interp_folders import solo
from tests.tiny import tiny_llama
from tests.tiny_features import Features, SimpleConfig, alone, tiny_sae, write_features

STEERING = Path(__file__).parent.parent / "demo" / "steering"
DEMO_SAE = "a5f309f5a90c705f55354a53b93a7e5e"
PROMPTS = ("the sea was", "he counted")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    root = tmp_path_factory.mktemp("steerability")
    model = tiny_llama(root / "model")
    return write_features(root, model, tiny_sae(model, "layers.1.resid_post"))


@pytest.fixture(scope="module")
def written(features: Features, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "steerability"
    stage.run(config(features, out), solo())
    return out


def config(features: Features, out: Path, **flags: object) -> SteerabilityConfig:
    given: dict[str, object] = {
        "model": str(features.model), "sae": features.sae, "explanations": features.explanations, "out": out,
        "prompts": PROMPTS, "rows": 7,
    }  # fmt: skip
    return SteerabilityConfig(**(given | flags))  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["dataset", "layer"])
def test_against_a_pass_a_latent(features: Features, norm: str) -> None:
    """The whole prompt each time, the figures word for word as they are defined."""
    model, tokenizer = load_model(str(features.model)).eval(), load_tokenizer(str(features.model))
    sae = tiny_sae(features.model, "layers.1.resid_post", norm=norm)
    ready = Latents(model, tokenizer, sae, PROMPTS, 10.0, 20)
    found = [ready.measure(range(first, min(48, first + 11))) for first in range(0, 48, 11)]
    columns = {name: torch.cat([getattr(part, name) for part in found]) for name in MEASURES}
    names = promoted_by(model, sae.site, sae.W_dec, tokenizer, 20).promoted
    by_name: dict[str, list[int]] = {}
    for i in range(tokenizer.n_vocab):
        by_name.setdefault(tokenizer.decode([i]), []).append(i)
    for latent in (0, 13, 47):
        if any(len(by_name[name]) > 1 for name in names[latent]):
            continue  # bytes that are no whole character have no name of their own
        promoted = [by_name[name][0] for name in names[latent]]
        twin = []
        for prompt in PROMPTS:
            tokens = torch.tensor([tokenizer.encode_prompt(prompt)])

            def turn_up(x: torch.Tensor, latent: int = latent) -> torch.Tensor:
                last = x[:, -1]
                push = 10 * sae.encode(last).values.max() * sae.W_dec[latent] / sae.normalise(last).scale
                return torch.cat((x[:, :-1], (last + push)[:, None]), 1)

            with torch.no_grad():
                before = model(tokens)[0, -1].softmax(0)
                with model.hooks({sae.site: turn_up}):
                    after = model(tokens)[0, -1].softmax(0)
            scores = []
            for p in (after, before):
                order = p.argsort(descending=True).tolist()
                scores.append(float((1 - min(map(order.index, promoted)) / len(p)) * p[promoted].max()))
            sure = [float(-p.topk(CONFIDENT_TOKENS).values.log().mean()) for p in (after, before)]
            twin.append((scores[0], scores[0] - scores[1], sure[0] - sure[1]))
        for name, values in zip(MEASURES, zip(*twin, strict=True), strict=True):
            assert float(columns[name][latent]) == pytest.approx(np.mean(values), rel=1e-3, abs=1e-5), (latent, name)


def test_a_latent_that_writes_one_token_has_the_largest_score(features: Features) -> None:
    """At final_norm a row along the unembedding of a token promotes it; one against all tokens promotes little."""
    model, tokenizer = load_model(str(features.model)).eval(), load_tokenizer(str(features.model))
    sae = tiny_sae(features.model, "final_norm")
    row = model.output.weight[100]
    sae.W_dec[5] = row / row.norm()
    found = Latents(model, tokenizer, sae, PROMPTS, 50.0, 20).measure(range(48))
    assert float(found.output_score[5]) > 0.9
    assert float(found.confidence_change[5]) > 0
    small = Latents(model, tokenizer, sae, PROMPTS, 1e-6, 20).measure(range(48))
    assert float(small.output_rise.abs().max()) < 1e-4
    assert float(small.confidence_change.abs().max()) < 1e-4


def test_the_stage(features: Features, written: Path, tmp_path: Path) -> None:
    assert verify(written).kind == "steerability"
    stage.run(config(features, tmp_path / "again"), solo())
    assert (tmp_path / "again" / "steerability.parquet").read_bytes() == (written / "steerability.parquet").read_bytes()
    found = read_steerability(written, load(features.sae).weights_hash)
    assert len(found.output_score) == 48
    order = found.order()
    assert sorted(order) == list(range(48))
    scores = found.output_score[order]
    assert (scores[:-1] >= scores[1:]).all()
    assert f"| {order[0]} |" in (written / "steerability.md").read_text()
    with pytest.raises(ValueError, match="another"):
        read_steerability(written, "another")
    stage.run(config(features, written), solo())  # complete: nothing to do


def searched(features: Features, capsys: pytest.CaptureFixture[str], **flags: object) -> list[dict[str, object]]:
    search.run(SearchConfig(sae=features.sae, json=True, **flags), solo())  # type: ignore[arg-type]
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_search_ranks_by_it(features: Features, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_steerability(written, load(features.sae).weights_hash)
    rows = searched(features, capsys, steerability=written, rank="steerability", n=10)
    assert [row["latent"] for row in rows] == found.order()[:10]
    assert rows[0]["output_score"] == found.of(found.order()[0])["output_score"]
    named = {"explanations": features.explanations, "text": "storms"}
    matches = searched(features, capsys, **named)
    ranked = searched(features, capsys, **named, steerability=written, rank="steerability")
    assert len(matches) > 2
    assert {row["latent"] for row in ranked} == {row["latent"] for row in matches}
    assert [row["latent"] for row in ranked] == sorted((row["latent"] for row in matches), key=found.order().index)
    shown = searched(features, capsys, **named, steerability=written)
    assert [row["latent"] for row in shown] == [row["latent"] for row in matches]
    assert "confidence_change" in shown[0]
    near = searched(features, capsys, latent=3, steerability=written, rank="steerability", n=5)
    assert len(near) == 5


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ({"rank": "steerability"}, "--steerability is missing"),
        ({}, "give one of --positive"),
        ({"rank": "steerability", "steerability": Path("s"), "latents": (1, 2), "top": Path("t")}, "--latents finds sentences"),
        ({"rank": "steerability", "steerability": Path("s"), "text": "a", "latent": 1}, "give one of --positive"),
    ],
)
def test_search_flags(flags: dict[str, object], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        SearchConfig(sae=Path("sae"), **flags)  # type: ignore[arg-type]


def test_the_report_shows_it(features: Features, written: Path, tmp_path: Path) -> None:
    flags = {"top": features.top, "explanations": features.explanations, "steerability": written}
    report.run(ReportConfig(**flags, out=tmp_path / "report"), solo())
    block = (tmp_path / "report" / "features" / "00000.js").read_text()
    data = json.loads(block[block.index(",") + 1 : block.rindex(")")])
    found = read_steerability(written, load(features.sae).weights_hash)
    for latent in (0, 40):
        assert data["features"][latent]["steers"] == pytest.approx(found.of(latent), rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ({"prompts": ()}, "--prompts: give at least one"),
        ({"factor": float("nan")}, "--factor must be a number above 0"),
        ({"rows": 0}, "--rows must be at least 1"),
        ({"prompts": ("",)}, "expected at least two tokens, found 1"),
        ({"prompts": ("x" * 500,)}, "the context holds 128"),
        ({"steering": STEERING}, DEMO_SAE),
    ],
)
def test_bad_input(features: Features, tmp_path: Path, flags: dict[str, object], fragment: str) -> None:
    with pytest.raises(ValueError, match=r"^.+$") as error:
        stage.run(config(features, tmp_path / "out", **flags), solo())
    assert fragment in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_site_without_a_logit_lens_is_named(features: Features) -> None:
    model, tokenizer = load_model(str(features.model)).eval(), load_tokenizer(str(features.model))
    with pytest.raises(ValueError, match=r"layers\.1\.attn_norm"):
        Latents(model, tokenizer, tiny_sae(features.model, "layers.1.attn_norm"), PROMPTS, 10.0, 20)


# Against measured steering ---------------------------------------------------------------------------------------------


def planted(noise: float) -> tuple[Steerability, list[SteeredFeature]]:
    """Scores of 200 latents, and effects of every other one that follow the output score but for noise."""
    generator = np.random.default_rng(0)
    score = generator.random(200).astype(np.float32)
    none = generator.random(200).astype(np.float32)
    effect = score + noise * generator.normal(size=200)
    steered = [SteeredFeature(i, dict.fromkeys(("firing", "promoted", "follows", "next_token", "words"), float(effect[i])))
               for i in range(0, 200, 2)]  # fmt: skip
    return Steerability(score, score, none), steered


def test_validation_finds_what_was_planted() -> None:
    rows = {(row["measure"], row["effect"]): row for row in validate(*planted(0.3), 500, 0)}
    found, none = rows["output_score", "firing"], rows["confidence_change", "firing"]
    assert 0.5 < found["spearman"]["low"] < found["spearman"]["value"] < found["spearman"]["high"] < 0.9
    assert found["top_decile"] > found["median"] + 0.2
    assert found["success"] >= 0.9
    assert none["spearman"]["low"] < 0 < none["spearman"]["high"]
    exact = validate(*planted(0), 50, 0)[0]
    assert exact["spearman"]["value"] == pytest.approx(1)
    assert exact["success"] == 1
    with pytest.raises(ValueError, match="expected 10 at least"):
        validate(planted(0)[0], planted(0)[1][:9], 50, 0)


def test_the_shipped_steering_folder_is_read() -> None:
    """Each feature once, at its best strength, with the differences that its own table shows."""
    found = read_steered(STEERING, DEMO_SAE)
    best = json.loads((STEERING / "best_strengths.json").read_text())
    assert sorted(feature.latent for feature in found) == sorted(map(int, best))
    table = [line.split("|") for line in (STEERING / "steering.md").read_text().split("## Each feature")[1].splitlines()]
    by_latent = {int(cells[1]): cells for cells in table if len(cells) > 8 and cells[1].strip().isdecimal()}
    for feature in found[:20]:
        random, steered = (float(part) for part in by_latent[feature.latent][-6].split("->"))
        assert 100 * feature.effects["firing"] == pytest.approx(steered - random, abs=0.011)
    with pytest.raises(ValueError, match="another"):
        read_steered(STEERING, "another")


def test_the_stage_holds_itself_against_steering(features: Features, tmp_path: Path) -> None:
    """A folder like that of inference.steering_eval, of the tiny SAE."""
    sae_hash = load(features.sae).weights_hash
    rows, best = [], {}
    for latent in range(12):
        best[str(latent)] = 0.5
        kinds = {kind: dict.fromkeys(("firing", "promoted", "follows", "next_token", "words"), value)
                 for kind, value in (("random", 0.1), ("steered", 0.1 + latent / 100))}  # fmt: skip
        rows += [{"latent": latent, "strength": s, "prompts": p} | kinds for s in (0.5, 0.9) for p in ("all", "odd")]
    folder = tmp_path / "steering"
    with building(folder, "steering", SimpleConfig(), alone(), provenance={"sae_hash": sae_hash}) as builder:
        builder.publish("steering.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        builder.publish("best_strengths.json", json.dumps(best).encode())
        builder.finish(["steering.jsonl", "best_strengths.json"], {})
    stage.run(config(features, tmp_path / "out", steering=folder, resamples=50), solo())
    found = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert len(found) == 15
    assert found[0]["features"] == 12
    assert found[0]["median"] == pytest.approx(0.055)
    assert "## Against measured steering" in (tmp_path / "out" / "steerability.md").read_text()
    shutil.rmtree(tmp_path / "out")

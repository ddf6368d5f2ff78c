"""Evaluation on a tiny Llama, from text to figures, against sums written out sentence by sentence."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from capture import activations, sentences
from capture.store import open_corpus
from core.artifact import open_artifact, verify
from llama3 import load_model, load_tokenizer
from sae.accumulator import Covariance
from sae.batches import Batches
from sae.evaluate import EvaluateConfig, run
from sae.evaluating.subject import Subject, batches, choose_sentences
from sae.model import SAE, SAEConfig, load
from sae.preprocess import PreprocessConfig
from sae.preprocess import run as preprocess
from sae.split import held_out
from tests.faults import ForkServer
from tests.sae_folders import ALONE
from tests.tiny import tiny_llama

TEXT = "the cat saw a red house near water while her old brother sang of winter and bread in the long morning"
WORDS = TEXT.split()


class House(NamedTuple):
    """A model, a corpus and the batches made of them."""

    model: Path
    corpus: Path
    batches: Path


def make_house(folder: Path, n_documents: int = 30, bos: str = "none") -> House:
    model = tiny_llama(folder / "model", seed=5)
    texts = folder / "texts"
    texts.mkdir()
    for i in range(n_documents):
        lines = [" ".join(WORDS[(i * 7 + j * 3 + m) % len(WORDS)] for m in range(3 + (i + j) % 6)) + "." for j in range(4)]
        (texts / f"{i:02d}.txt").write_text(" ".join(line.capitalize() for line in lines))
    sentences.run(sentences.SentencesConfig(source=str(texts), out=folder / "corpus"), ALONE)
    activations.run(
        activations.ActivationsConfig(
            model=str(model), corpus=folder / "corpus", out=folder / "acts", sites=("layers.1.resid_post",), storage="fp32",
            bos=bos, max_length=20,  # type: ignore[arg-type]
        ),
        ALONE,
    )  # fmt: skip
    preprocess(
        PreprocessConfig(
            activations=folder / "acts", out=folder / "batches", batch_rows=64, validation_fraction=0.3, max_norm_ratio=1.6
        ),
        ALONE,
    )
    return House(model, folder / "corpus", folder / "batches")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return make_house(tmp_path_factory.mktemp("house"))


def sae_of(house: House, folder: Path, exact: bool = False, **provenance: Any) -> SAE:
    """Random with k 4, or one that reconstructs every row exactly; saved in `folder`."""
    data = Batches(house.batches)
    sae = SAE(
        SAEConfig(
            d_model=32,
            n_latents=64,
            k=64 if exact else 4,
            scale=data.statistics.scale("dataset"),
            provenance=data.provenance | provenance,
        )
    )
    sae.initialise_("tied", torch.Generator().manual_seed(3))
    with torch.no_grad():
        if exact:
            for weight in (sae.W_enc, sae.W_dec):
                weight.copy_(torch.cat((torch.eye(32), -torch.eye(32))))
        else:
            sae.b_pre.copy_(data.statistics.centre("dataset"))
    sae.save(folder)
    return load(folder)


def config(house: House, sae: Path, out: Path, **overrides: Any) -> EvaluateConfig:
    values = {"sae": sae, "model": str(house.model), "corpus": house.corpus, "out": out, "batch_tokens": 60} | overrides
    return EvaluateConfig(**values)


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation.json").read_text()))


def values(folder: Path) -> dict[str, Any]:
    return {name: figure["value"] for name, figure in read(folder).items()}


def written_out(house: House, sae: SAE, ids: Tensor, bos: bool) -> dict[str, float]:
    """The figures of the SAE over sentences `ids`, one sentence and one token at a time."""
    model, tokenizer, site = load_model(house.model), load_tokenizer(house.model), "layers.1.resid_post"
    limit, first = sae.cfg.provenance["max_norm"], int(bos)
    xs, hats, l0, fired, nll, kl = [], [], [], torch.zeros(64), {"clean": 0.0, "sae": 0.0, "zero": 0.0}, 0.0
    n_targets = excluded = 0
    with torch.no_grad():
        for text in open_corpus(house.corpus).texts(ids):
            tokens = torch.tensor([[tokenizer.bos_id] * first + tokenizer.encode(text)[:20]])
            x = model.capture(tokens, [site])[site][0]
            stand_ins = {"clean": x, "sae": x.clone(), "zero": x.clone()}
            for t in range(first, len(x)):
                if x[t].norm() > limit:
                    excluded += 1
                    continue
                latents = sae.encode(x[t : t + 1])
                hat = sae.decode(latents)[0]
                xs.append(x[t].double())
                hats.append(hat.double())
                l0.append(int((latents.values > 0).sum()))
                fired[latents.indices[latents.values > 0]] += 1
                stand_ins["sae"][t], stand_ins["zero"][t] = hat, 0
            log_p = {}
            for name, row in stand_ins.items():
                with model.hooks({site: lambda x, row=row: row[None]}):
                    log_p[name] = model(tokens)[0].log_softmax(-1)
                nll[name] -= sum(float(log_p[name][t, tokens[0, t + 1]]) for t in range(len(x) - 1))
            kl += float((log_p["clean"].exp() * (log_p["clean"] - log_p["sae"]))[:-1].sum())
            n_targets += len(x) - 1
    X, H = torch.stack(xs), torch.stack(hats)
    ce = {name: total / n_targets for name, total in nll.items()}
    return {
        "fvu": float((X - H).square().sum() / (X - X.mean(0)).square().sum()),
        "l0": sum(l0) / len(l0),
        "over_10_percent": float((fired > 0.1 * len(xs)).float().mean()),
        "dead_fraction": float((fired == 0).float().mean()),
        "cosine": float(torch.cosine_similarity(X, H).mean()),
        "l2_ratio": float((H.norm(dim=1) / X.norm(dim=1)).mean()),
        "relative_reconstruction_bias": float(H.square().sum(1).mean() / (X * H).sum(1).mean()),
        "ce_clean": ce["clean"],
        "ce_sae": ce["sae"],
        "ce_zero": ce["zero"],
        "ce_recovered": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "kl": kl / n_targets,
        "tokens": len(xs),
        "excluded_tokens": excluded,
    }


@pytest.mark.parametrize("bos", ["none", "feed"])
def test_figures_equal_those_written_out(tmp_path: Path, bos: str) -> None:
    house = make_house(tmp_path, n_documents=12, bos=bos)
    sae = sae_of(house, tmp_path / "sae")
    settings = config(house, tmp_path / "sae", tmp_path / "out", sentences=9)
    run(settings, ALONE)
    found = read(tmp_path / "out")
    sample = choose_sentences(open_corpus(house.corpus), [sae.cfg.provenance], 9, settings.seed)
    assert len(sample.evaluated) == 9
    expected = written_out(house, sae, sample.evaluated, bos == "feed")
    assert expected["excluded_tokens"] > 0
    for name in ("tokens", "excluded_tokens"):
        assert found["fvu"]["conditions"][name] == expected.pop(name)
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, rel=2e-4), name
    assert found["explained_variance"]["value"] == pytest.approx(1 - expected["fvu"], rel=1e-4)


def test_an_exact_sae_costs_nothing(house: House, tmp_path: Path) -> None:
    sae_of(house, tmp_path / "sae", exact=True)
    run(config(house, tmp_path / "sae", tmp_path / "out"), ALONE)
    found = values(tmp_path / "out")
    assert found["fvu"] < 1e-9
    ones = ("explained_variance", "ce_recovered", "ce_recovered_mean", "cosine", "l2_ratio", "relative_reconstruction_bias")
    for name in ones:
        assert found[name] == pytest.approx(1, abs=1e-4), name
    assert abs(found["kl"]) < 1e-5
    assert found["ce_zero"] != found["ce_clean"]  # else recovered would say nothing
    assert found["l0"] == 32


def test_baselines_stand_in_order_and_everything_is_written(house: House, tmp_path: Path) -> None:
    sae_of(house, tmp_path / "sae")
    run(config(house, tmp_path / "sae", tmp_path / "out"), ALONE)
    found, manifest = read(tmp_path / "out"), verify(tmp_path / "out")
    assert manifest.kind == "evaluation"
    names = ["compared.json", "core.json", "densities.png", "evaluation.json", "evaluation.md"]
    assert [record.name for record in manifest.files] == names
    assert (tmp_path / "out" / "densities.png").read_bytes().startswith(b"\x89PNG")
    assert manifest.inputs[0] == open_artifact(tmp_path / "sae").as_input()
    assert 0 < found["fvu_pca"]["value"] < found["fvu_mean"]["value"] == pytest.approx(1, abs=0.1)
    assert found["fvu_random_sae"]["value"] > found["fvu_pca"]["value"]
    for figure in found.values():
        conditions = figure["conditions"]
        assert (conditions["site"], conditions["bos"], conditions["model_dtype"], conditions["seed"]) == (
            "layers.1.resid_post", "none", "float32", 0,
        )  # fmt: skip
        assert conditions["split"] == "validation documents"
    assert found["l0"]["p10"] <= found["l0"]["value"] <= found["l0"]["p90"] <= 4
    page = (tmp_path / "out" / "evaluation.md").read_text()
    low, high = found["fvu"]["interval"]
    assert f"| fvu | {found['fvu']['value']:.4f} ({low:.4f} to {high:.4f}) |" in page
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run(config(house, tmp_path / "sae", tmp_path / "out"), ALONE)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_only_held_out_documents_are_evaluated(house: House, tmp_path: Path) -> None:
    sae, corpus = sae_of(house, tmp_path / "sae"), open_corpus(house.corpus)
    trained_on = sae.cfg.provenance
    sample = choose_sentences(corpus, [trained_on], 0, seed=0)
    assert held_out(corpus.document_ids(sample.evaluated), 0.3, 0).all()
    assert not held_out(corpus.document_ids(sample.fitted), 0.3, 0).any()
    every = held_out(corpus.document_ids(range(corpus.n_sentences)), 0.3, 0)
    assert len(sample.evaluated) == int(every.sum())
    other = choose_sentences(corpus, [trained_on | {"corpus_hash": "other"}], 5, seed=0)
    assert other.split == "all documents of another corpus"
    assert len(other.evaluated) == len(other.fitted) == 5
    assert not set(other.evaluated.tolist()) & set(other.fitted.tolist())
    nothing = choose_sentences(corpus, [trained_on | {"validation_fraction": 0.0}], 0, seed=0)
    assert nothing.split == "all documents of the training corpus"
    both = choose_sentences(corpus, [trained_on, trained_on | {"split_seed": 1}], 0, seed=0)
    ids = corpus.document_ids(both.evaluated)
    assert held_out(ids, 0.3, 0).all(), "no SAE of a comparison was trained on what is evaluated"
    assert held_out(ids, 0.3, 1).all()
    assert 0 < len(both.evaluated) < len(sample.evaluated)


def test_two_ranks_write_the_same_bytes(fork_server: ForkServer, house: House, tmp_path: Path) -> None:
    sae_of(house, tmp_path / "sae")
    settings = config(house, tmp_path / "sae", tmp_path / "one", threads=1)
    run(settings, ALONE)
    flags = ("--sae", tmp_path / "sae", "--model", house.model, "--corpus", house.corpus, "--out", tmp_path / "two")
    more = ("--batch-tokens", 60, "--device", "cpu", "--threads", 1)
    done = fork_server.ranks(2, "sae.evaluate", *flags, *more)
    assert done.returncode == 0, done.stderr
    assert "CE recovered" in done.stderr
    for name in ("evaluation.json", "compared.json", "core.json", "evaluation.md", "densities.png", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_saes_are_compared_on_the_same_tokens(house: House, tmp_path: Path) -> None:
    """In one pass, a second SAE has the figures that it has alone; baselines have theirs in the model too."""
    sae_of(house, tmp_path / "a" / "sae")
    sae_of(house, tmp_path / "b" / "sae", exact=True)
    both = tmp_path / "both"
    run(config(house, tmp_path / "a" / "sae", both, compare=(tmp_path / "b" / "sae",), baseline_losses=True), ALONE)
    run(config(house, tmp_path / "b" / "sae", tmp_path / "alone"), ALONE)
    compared, alone = json.loads((both / "compared.json").read_text()), read(tmp_path / "alone")
    assert list(compared) == ["b", "PCA, 4 components", "random SAE", "mean", "identity"]
    for name, figure in compared["b"].items():
        if name in alone:
            assert figure == {key: alone[name][key] for key in ("value", "interval")}, name
    assert compared["identity"]["explained_variance"]["value"] == compared["identity"]["ce_recovered"]["value"] == 1
    assert compared["identity"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert compared["mean"]["ce_recovered_mean"]["value"] == 0
    assert compared["mean"]["ce_sae"] == compared["b"]["ce_mean"]
    assert compared["PCA, 4 components"]["fvu"]["value"] == values(both)["fvu_pca"]
    assert compared["random SAE"]["fvu"]["value"] == values(both)["fvu_random_sae"]
    assert compared["PCA, 4 components"]["kl"]["value"] > 0.01
    head = next(line for line in (both / "evaluation.md").read_text().splitlines() if line.startswith("| figure"))
    assert head == "| figure | a | b | PCA, 4 components | random SAE | mean | identity |"


def test_core_results_have_saebenchs_shape(house: House, tmp_path: Path) -> None:
    sae_of(house, tmp_path / "sae")
    run(config(house, tmp_path / "sae", tmp_path / "out"), ALONE)
    core, ours = json.loads((tmp_path / "out" / "core.json").read_text()), values(tmp_path / "out")
    assert core["eval_type_id"] == "core"
    metrics = core["eval_result_metrics"]
    assert metrics["model_performance_preservation"]["ce_loss_score"] == ours["ce_recovered"]
    assert metrics["model_behavior_preservation"]["kl_div_score"] == pytest.approx(1 - ours["kl"] / ours["kl_zero"])
    assert metrics["misc_metrics"]["frac_alive"] == 1 - ours["dead_fraction"]
    assert None not in [value for category in metrics.values() for value in category.values()]
    details = core["eval_result_details"]
    assert [latent["index"] for latent in details] == list(range(64))
    assert sum(latent["feature_density"] for latent in details) == pytest.approx(ours["l0"], rel=1e-3)
    active = [latent["consistent_activation_heuristic"] for latent in details if latent["feature_density"] > 0]
    assert min(active) >= 1
    assert ours["over_1_percent"] == sum(latent["feature_density"] > 0.01 for latent in details) / 64


@pytest.mark.parametrize(
    ("change", "message"),
    [({"site": "layers.0.resid_post"}, "site is 'layers.0.resid_post'"), ({"bos": "feed"}, "bos is 'feed'"), ({}, "twice")],
)
def test_saes_that_read_other_things_are_not_compared(
    house: House, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    sae_of(house, tmp_path / "a" / "sae")
    sae_of(house, tmp_path / "b" / "sae", **change)
    other = tmp_path / ("b" if change else "a") / "sae"
    with pytest.raises(ValueError, match=f"--compare .*{message}"):
        run(config(house, tmp_path / "a" / "sae", tmp_path / "out", compare=(other,)), ALONE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"model_hash": "elsewhere"}, "model_hash is '.*', but 'elsewhere' is needed"),
        ({"tokenizer_hash": "elsewhere"}, "tokenizer_hash is '.*', but 'elsewhere' is needed"),
        ({"site": "layers.7.resid_post"}, r"unknown site 'layers\.7\.resid_post'"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    house: House, tmp_path: Path, provenance: dict[str, str], message: str
) -> None:
    sae_of(house, tmp_path / "sae", **provenance)
    with pytest.raises(ValueError, match=message):
        run(config(house, tmp_path / "sae", tmp_path / "out"), ALONE)
    assert not (tmp_path / "out").exists()


def test_other_weights_are_accepted_on_request_and_recorded(house: House, tmp_path: Path) -> None:
    sae_of(house, tmp_path / "sae", model_hash="elsewhere")
    run(config(house, tmp_path / "sae", tmp_path / "out", other_weights=True), ALONE)
    manifest = open_artifact(tmp_path / "out", "evaluation").manifest
    assert manifest.provenance["model_hash"] == load_model(house.model).weights_hash
    assert values(tmp_path / "out")["fvu"] is not None


def test_one_sentence_can_be_evaluated(tmp_path: Path) -> None:
    house = make_house(tmp_path, n_documents=1)
    sae_of(house, tmp_path / "sae", validation_fraction=0.0)
    run(config(house, tmp_path / "sae", tmp_path / "out", sentences=1), ALONE)
    assert values(tmp_path / "out")["fvu"] is not None


def test_batches_hold_every_token_once(house: House, tmp_path: Path) -> None:
    sae = sae_of(house, tmp_path / "sae")
    subject = Subject(sae, load_model(house.model), load_tokenizer(house.model), batch_tokens=60)
    texts = [*open_corpus(house.corpus).texts(range(40)), "", "x" * 500]
    found = []
    for batch in batches(subject, texts, range(len(texts))):
        assert batch.tokens.numel() <= 60 or len(batch.tokens) == 1
        found += [(row[real].tolist(), int(i)) for row, real, i in zip(batch.tokens, batch.real, batch.groups, strict=True)]
    expected = [(subject.tokenizer.encode(text)[:20], i) for i, text in enumerate(texts) if text]
    assert sorted(found) == sorted(expected)


def test_covariance() -> None:
    x = 100 + torch.randn(6000, 4, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([3.0, 1, 2, 0.1]))
    covariance = Covariance.none(4)
    for part in x.split([10, 0, 4990, 1000]):
        covariance.add(part)
    torch.testing.assert_close(covariance.m2 / 5999, x.double().T.cov(), rtol=1e-10, atol=1e-12)
    components = covariance.components(2).abs()
    assert components.argmax(0).tolist() == [0, 2]

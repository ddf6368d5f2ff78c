"""Model, tokenizer, SAE, layer, width, dtype and corpus that do not belong together are refused before anything is written."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capture.activations import ActivationsConfig
from capture.activations import run as capture
from capture.sentences import SentencesConfig
from capture.sentences import run as cut
from inference.complete import CompleteConfig
from inference.complete import run as complete
from interpretability.top_sentences import TopSentencesConfig
from interpretability.top_sentences import run as find_top
from sae.evaluate import EvaluateConfig
from sae.evaluate import run as evaluate
from sae.model import SAE, load
from sae.preprocess import PreprocessConfig
from sae.preprocess import run as preprocess
from sae.train import TrainConfig
from sae.train import run as train
from tests.tiny import tiny_llama
from tests.tiny_features import SENTENCES, alone

PLACE: dict[str, Any] = {"device": "cpu", "threads": 1}
SITE, OTHER_SITE = "layers.1.resid_post", "layers.0.resid_post"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole chain in `right`, and beside it parts that are whole but belong to something else."""
    root = tmp_path_factory.mktemp("grid")
    model = tiny_llama(root / "model")
    tiny_llama(root / "other_model", seed=9)
    shutil.copytree(model, root / "retokenized")
    lines = (model / "tokenizer.model").read_text().splitlines()
    swapped = [f"{a.split()[0]} {b.split()[1]}" for a, b in zip(lines[-2:], reversed(lines[-2:]), strict=True)]
    (root / "retokenized" / "tokenizer.model").write_text("\n".join([*lines[:-2], *swapped]) + "\n")
    for name, texts in (("corpus", SENTENCES * 8), ("other_corpus", SENTENCES[:-1] * 9)):
        (root / f"{name}.txt").write_text("".join(f"{text}, {i} times.\n\n" for i, text in enumerate(texts)))
        cut(SentencesConfig(source=str(root / f"{name}.txt"), out=root / name, **PLACE), alone())
    base: dict[str, Any] = {"model": str(model), "corpus": root / "corpus", "sites": (SITE,), "max_length": 96, **PLACE}
    for name, change in {
        "acts": {},
        "acts_of_another_layer": {"sites": (OTHER_SITE,)},
        "acts_of_another_dtype": {"storage": "int8"},
        "acts_of_another_model": {"model": str(root / "other_model")},
        "acts_with_another_bos": {"bos": "none"},
    }.items():
        capture(ActivationsConfig(out=root / name, **(base | change)), alone())
    preprocess(PreprocessConfig(activations=root / "acts", out=root / "batches", batch_rows=64, **PLACE), alone())
    shape: dict[str, Any] = {"n_latents": 32, "k": 3, "batch_size": 64, "max_steps": 2, "wandb": "off"}
    train(TrainConfig(batches=root / "batches", out=root / "run", **shape, **PLACE), alone())
    sae = load(root / "run/sae")
    find_top(top_config(root, root / "top"), alone())
    altered(sae, sae_hash="1").save(root / "another_sae")
    altered(sae, site="layers.7.resid_post").save(root / "sae_of_a_deeper_layer")
    altered(sae, site=OTHER_SITE).save(root / "sae_of_another_layer")
    altered(sae, model_hash="0" * 16).save(root / "sae_of_another_model")
    altered(sae, tokenizer_hash="0" * 16).save(root / "sae_of_another_tokenizer")
    narrow = SAE(replace(sae.cfg, d_model=24, provenance=sae.cfg.provenance))
    narrow.save(root / "sae_of_another_width")
    return root


def altered(sae: SAE, **provenance: Any) -> SAE:
    """The same weights, said to come from elsewhere; `sae_hash` stands for other weights."""
    other = SAE(replace(sae.cfg, provenance=sae.cfg.provenance | {k: v for k, v in provenance.items() if k != "sae_hash"}))
    other.load_state_dict(sae.state_dict())
    if "sae_hash" in provenance:
        with torch.no_grad():
            other.b_enc += 1
    return other


def top_config(root: Path, out: Path, **change: str) -> TopSentencesConfig:
    named = {
        name: root / path for name, path in ({"sae": "run/sae", "activations": "acts", "corpus": "corpus"} | change).items()
    }
    model = str(named.pop("model", root / "model"))
    return TopSentencesConfig(model=model, out=out, n=3, **named, **PLACE)  # type: ignore[arg-type]


def run_top(root: Path, out: Path, **change: str) -> None:
    find_top(top_config(root, out, **change), alone())


def run_evaluate(root: Path, out: Path, model: str = "model", sae: str = "run/sae") -> None:
    evaluate(EvaluateConfig(sae=root / sae, model=str(root / model), corpus=root / "corpus", out=out, **PLACE), alone())


def run_complete(root: Path, out: Path, model: str = "model", sae: str = "run/sae", top: str = "top") -> None:
    config = CompleteConfig(
        model=str(root / model), sae=(root / sae,), top=(root / top,), prompt=("the sea",), max_new_tokens=1, **PLACE
    )
    complete(config, alone())


@pytest.mark.parametrize(
    ("run", "change", "key"),
    [
        (run_evaluate, {"model": "other_model"}, "model_hash"),
        (run_evaluate, {"model": "retokenized"}, "tokenizer_hash"),
        (run_evaluate, {"sae": "sae_of_another_width"}, "d_model"),
        (run_top, {"model": "retokenized"}, "tokenizer_hash"),
        (run_top, {"sae": "sae_of_another_model"}, "model_hash"),
        (run_top, {"sae": "sae_of_another_tokenizer"}, "tokenizer_hash"),
        (run_top, {"sae": "sae_of_another_width"}, "d_model"),
        (run_top, {"sae": "sae_of_another_layer"}, "site"),
        (run_top, {"activations": "acts_of_another_layer"}, "site"),
        (run_top, {"activations": "acts_of_another_dtype"}, "dtype"),
        (run_top, {"activations": "acts_of_another_model"}, "model_hash"),
        (run_top, {"activations": "acts_with_another_bos"}, "bos"),
        (run_top, {"corpus": "other_corpus"}, "corpus_hash"),
        (run_complete, {"model": "other_model"}, "model_hash"),
        (run_complete, {"model": "retokenized"}, "tokenizer_hash"),
        (run_complete, {"sae": "sae_of_another_width"}, "d_model"),
        (run_complete, {"sae": "sae_of_a_deeper_layer"}, "site"),
        (run_complete, {"sae": "sae_of_another_layer"}, "site"),
        (run_complete, {"sae": "another_sae"}, "sae_hash"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else getattr(value, "__name__", value),
)
def test_what_does_not_belong_together(
    root: Path, tmp_path: Path, run: Callable[..., None], change: dict[str, str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=key) as refused:
        run(root, tmp_path / "out", **change)
    assert time.process_time() - began < 5
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_what_belongs_together_runs(root: Path, tmp_path: Path) -> None:
    run_evaluate(root, tmp_path / "evaluation")
    run_top(root, tmp_path / "top")
    run_complete(root, tmp_path)

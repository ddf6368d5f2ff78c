"""What ships in demo/: the embedded model, the finished SAE, the notebook that uses both, and the demo's command lines."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

import sae
from core.artifact import verify
from core.cli import parse
from demo.__main__ import DemoConfig, stages
from demo.showcase import highlighted
from interpretability.records import TopSentence, open_top, read_explanations
from llama3 import load_model, load_tokenizer

ROOT = Path(__file__).parent.parent
MIB = 2**20


def test_the_embedded_model_is_what_its_card_says() -> None:
    weights = ROOT / "demo/model/consolidated.safetensors"
    assert weights.stat().st_size <= 16 * MIB
    model, tokenizer = load_model("demo"), load_tokenizer("demo")
    assert 6e6 <= sum(p.numel() for p in model.parameters()) <= 8e6
    assert model.params.max_seq_len >= 256
    assert model.params.n_kv_heads < model.params.n_heads
    assert tokenizer.n_vocab == model.params.vocab_size == 8192
    evaluation = json.loads((ROOT / "demo/model/evaluation.json").read_text())
    bits = evaluation["bits_per_byte"]
    assert bits["model"] < bits["5-gram"]
    assert bits["model"] < bits["xz"]


def test_the_embedded_model_still_scores_what_was_measured() -> None:
    """The figures of the card belong to these very weights: the loss on a passage is that of a trained model."""
    model, tokenizer = load_model("demo"), load_tokenizer("demo")
    text = "The ship left the harbour before the storm, and the captain watched the waves from the bridge."
    ids = torch.tensor([tokenizer.encode(text, bos=True)])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
    assert loss < 5.5  # guessing among 8,192 tokens costs 9.0


def test_the_finished_sae_is_small_whole_and_belongs_to_the_model() -> None:
    folders = [ROOT / "demo" / name for name in ("sae", "top", "explanations")]
    for folder in folders:
        assert verify(folder).complete
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()) <= 5 * MIB
    loaded, model = sae.load(folders[0]), load_model("demo")
    assert loaded.cfg.provenance["model_hash"] == model.weights_hash
    assert open_top(folders[1]).provenance["sae_hash"] == loaded.weights_hash
    explanations = read_explanations(folders[2])
    assert len(explanations) == loaded.cfg.n_latents
    assert sum(e.state == "valid" for e in explanations.values()) > 0.8 * len(explanations)
    assert all(len(e.title.split()) <= 6 for e in explanations.values())


def test_the_demo_chains_every_stage_with_flags_that_exist(tmp_path: Path) -> None:
    """Each printed command line parses with its stage's own flags."""
    import importlib

    for quick in (False, True):
        for stage in stages(DemoConfig(quick=quick, out=tmp_path), "documents.jsonl"):
            module = importlib.import_module(stage.module.split()[0])
            flags = [*stage.module.split()[1:], *stage.flags, "--out", str(stage.out)]
            configs = [
                value for name, value in vars(module).items() if name.endswith("Config") and value.__module__ == module.__name__
            ]
            assert len(configs) == 1, stage.module
            parse(configs[0], "", flags)


def test_highlighting_marks_the_tokens_that_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sentence = TopSentence(0, "max", 0, 9.0, 1, "d", None, "The cat sat.", ["The", " cat", " sat", "."], [0.0, 9.0, 4.0, 1.0])
    assert highlighted(sentence) == "The «cat» «sat»."

"""What ships in demo/: the embedded model, the finished SAE, the notebook that uses both, and the demo's command lines."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

import demo.__main__ as front
import sae
from core.artifact import verify
from core.cli import parse
from core.shipped import shipped_for
from demo.__main__ import DemoConfig, app_flags, plan_of
from demo.plan import REAL, Plan
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

    real = Plan("smollm2", REAL, tmp_path, "", "", 1, shipped_for("demo"))  # any SAE that ships is trained further alike
    for plan in (plan_of(DemoConfig()), plan_of(DemoConfig(quick=True, source="x.txt")), real):
        for stage in plan.stages():
            module = importlib.import_module(stage.module.split()[0])
            flags = [*stage.module.split()[1:], *stage.flags, "--out", str(stage.out)]
            configs = [
                value for name, value in vars(module).items() if name.endswith("Config") and value.__module__ == module.__name__
            ]
            assert len(configs) == 1, stage.module
            parse(configs[0], "", flags)


def test_out_is_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "locate", lambda path: Path("x"))
    assert plan_of(DemoConfig(out=tmp_path, quick=True)).out == plan_of(DemoConfig(out=tmp_path)).out == tmp_path
    assert plan_of(DemoConfig()).out == Path("runs/smollm2")
    assert plan_of(DemoConfig(model="demo")).out == Path("runs/demo")
    assert plan_of(DemoConfig(quick=True)).out == Path("runs/demo-quick")
    assert plan_of(DemoConfig(model="ollama:llama3.2:1b")).out == Path("runs/ollama-llama3.2-1b")


def test_the_sae_that_ships_is_trained_further_and_shown_whole(tmp_path: Path) -> None:
    base = shipped_for("demo")
    assert base is not None
    plan = Plan("smollm2", REAL, tmp_path, "", "", 0, base)
    commands = {stage.name: stage.command for stage in plan.stages()}
    train = " ".join(commands["train"])
    assert f"--init-from {base.sae} --architecture topk --n-latents 1024 --k 16 --norm dataset" in train
    assert "--sites layers.4.resid_post" in " ".join(commands["activations"])
    assert app_flags(plan) == ["--model", "smollm2"]
    assert plan.write_documents() == 810 + 690
    topics = [json.loads(line)["label"] for line in plan.documents.read_text().splitlines()[:100]]
    assert len(set(topics)) > 60  # the beginning is a fair sample
    assert plan.write_documents() == 0


def test_where_the_default_cannot_be_had_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(path: str) -> Path:
        raise ValueError(f"{path}: pip could not download it;\n alternatives: a wheel")

    monkeypatch.setattr(front, "DEFAULT_MODEL", "smollm2")
    monkeypatch.setattr(front, "locate", nowhere)
    plan = plan_of(DemoConfig())
    assert (plan.model, plan.base, plan.out) == ("demo", None, Path("runs/demo"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "smollm2: pip could not download it; alternatives: a wheel" in said
    assert plan_of(DemoConfig(quick=True)).model == "demo"
    assert not capsys.readouterr().err
    monkeypatch.setattr(front, "locate", lambda path: Path("x"))
    assert plan_of(DemoConfig()).model == "smollm2"
    assert plan_of(DemoConfig(model="demo")).model == "demo"


def test_highlighting_marks_the_tokens_that_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sentence = TopSentence(0, "max", 0, 9.0, 1, "d", None, "The cat sat.", ["The", " cat", " sat", "."], [0.0, 9.0, 4.0, 1.0])
    assert highlighted(sentence) == "The «cat» «sat»."

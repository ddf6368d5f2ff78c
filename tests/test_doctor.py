"""demo/doctor.py: says what is there and what is missing, and never a key."""

import sys
from pathlib import Path

import pytest
import torch

from core.artifact import building
from core.cli import StageConfig
from core.runtime import Runtime, Solo
from demo import doctor as room
from demo.doctor import doctor

SECRET = "sk-never-shown-0123456789"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without keys, programs or embedded files."""
    for name in ("WANDB_API_KEY", "ANTHROPIC_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(room, "HERE", tmp_path / "demo")
    monkeypatch.setattr(room.huggingface_hub, "get_token", lambda: None)
    return tmp_path / "demo"


def embed(folder: Path) -> None:
    (folder / "model").mkdir(parents=True)
    for name in ("params.json", "tokenizer.model", "consolidated.safetensors"):
        (folder / "model" / name).write_bytes(b"x" * 2**20)
    alone = Runtime(0, 1, torch.device("cpu"), Solo())
    for name, kind in (("sae", "sae"), ("top", "top_sentences"), ("explanations", "explanations")):
        with building(folder / name, kind, StageConfig(), alone) as builder:
            builder.publish("a", b"x")
            builder.finish(["a"], {})


def test_a_bare_machine_is_told_what_is_missing_and_how_to_get_it(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 1
    out = capsys.readouterr().out
    assert f"+ python                   {sys.version.split()[0]}" in out
    assert f"+ torch                    {torch.__version__}" in out
    for line in (
        "needed    embedded model: clone the repository again",
        "optional  Chromium: apt-get install chromium",
        "optional  Anthropic key: set ANTHROPIC_API_KEY",
        "optional  Weights & Biases key: wandb login",
        "optional  embedded sae: make demo",
        "The demo cannot run yet",
    ):
        assert line in out
    assert "GB available" in out
    assert "free disk" in out


def test_a_full_machine_can_run_the_demo_and_no_key_is_shown(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(bare)
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    (bare.parent / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (bare.parent / ".netrc").chmod(0o600)
    (bare.parent / "chromium").write_text("#!/bin/sh\n")
    (bare.parent / "chromium").chmod(0o755)
    assert doctor() == 0
    out = capsys.readouterr().out
    assert SECRET not in out
    assert "+ Anthropic key            present" in out
    assert "+ Weights & Biases key     present" in out
    assert f"+ Chromium                 {bare.parent / 'chromium'}" in out
    assert "+ embedded model " in out
    assert "(1.0 MiB)" in out
    assert "The demo can run: make demo" in out


def test_an_embedded_folder_of_another_kind_or_unfinished_is_missing(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed(bare)
    (bare / "top" / "manifest.json").write_bytes((bare / "sae" / "manifest.json").read_bytes())
    (bare / "explanations" / "manifest.json").unlink()
    assert doctor() == 0
    out = capsys.readouterr().out
    assert "expected a complete folder of kind top_sentences, found sae" in out
    assert "- embedded explanations" in out


def test_too_little_room_is_said(bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    embed(bare)
    monkeypatch.setattr(room, "DISK_GB", 10**9)
    monkeypatch.setattr(room, "MEMORY_GB", 10**9)
    assert doctor() == 1
    out = capsys.readouterr().out
    assert "needed    free disk: free some room" in out
    assert "needed    memory: the demo needs" in out

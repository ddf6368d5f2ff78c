"""Models that Ollama has pulled, found by their names."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama3 import Transformer, load_model
from llama3.ollama import ADAPTER, MODEL, find_ollama
from tests.gguf_files import llama_gguf
from tests.tiny import tiny_args

LLAMA = ("registry.ollama.ai", "library", "llama3.2", "1b")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ollama's folder with one model, llama3.2:1b."""
    folder = tmp_path / "models"
    monkeypatch.setenv("OLLAMA_MODELS", str(folder))
    add(folder, LLAMA, llama_gguf(tmp_path / "x.gguf", Transformer(tiny_args(vocab_size=64))).read_bytes())
    return folder


def add(folder: Path, parts: tuple[str, ...], content: bytes, **changes: Any) -> Path:
    """A model's manifest and blob, as `ollama pull` leaves them; returns the blob."""
    digest = hashlib.sha256(content).hexdigest()
    blob = folder / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    layers = [
        {"mediaType": MODEL, "digest": f"sha256:{digest}", "size": len(content)} | changes,
        {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'0' * 64}", "size": 1},
    ]
    manifest = folder.joinpath("manifests", *parts)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return blob


def test_a_model_by_its_name(models: Path) -> None:
    model = load_model("ollama:llama3.2:1b")
    assert model(torch.arange(5)[None]).shape == (1, 5, 64)
    assert find_ollama("library/llama3.2:1b") == find_ollama("registry.ollama.ai/library/llama3.2:1b")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tiny", ("registry.ollama.ai", "library", "tiny", "latest")),
        ("someone/tiny:q4", ("registry.ollama.ai", "someone", "tiny", "q4")),
        ("hf.co/someone/tiny-GGUF:Q4_K_M", ("hf.co", "someone", "tiny-GGUF", "Q4_K_M")),
    ],
)
def test_names_in_short_and_in_full(models: Path, name: str, parts: tuple[str, ...]) -> None:
    blob = add(models, parts, name.encode())
    assert find_ollama(name) == blob


def test_the_home_folder_where_no_other_is_set(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ollama").mkdir()
    models.rename(tmp_path / ".ollama" / "models")
    assert find_ollama("llama3.2:1b").is_relative_to(tmp_path / ".ollama")


def refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        find_ollama(name)
    assert "\n" not in str(error.value)


def test_what_is_there_is_listed(models: Path) -> None:
    add(models, ("registry.ollama.ai", "someone", "tiny", "q4"), b"x")
    add(models, ("hf.co", "someone", "big", "latest"), b"y")
    refused("llama3.2:3b", r"which holds hf\.co/someone/big:latest, llama3\.2:1b, someone/tiny:q4; get it with `ollama pull")
    for index in range(20):
        add(models, ("registry.ollama.ai", "library", f"m{index}", "latest"), b"x")
    refused("llama3.2:3b", r" and 11 more; ")


def test_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "absent"))
    refused("llama3.2:1b", r"absent, which holds no model; .*OLLAMA_MODELS")


@pytest.mark.parametrize("name", ["", ":1b", "../../x:y", "a/b/c/d", "a//b", "x:..", "x:a/b", "x y"])
def test_what_is_no_name(models: Path, name: str) -> None:
    refused(name, "is no name of Ollama's")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mediaType": ADAPTER}, "is a model with an adapter"),
        ({"mediaType": "other"}, "expected one layer of type"),
        ({"digest": "sha256:../../etc/passwd"}, "expected one layer of type"),
        ({"digest": f"sha256:{'1' * 64}"}, "its file .* is not there"),
        ({"size": 7}, r"has \d+ bytes, expected 7 bytes"),
    ],
)
def test_damaged_manifests_and_blobs(models: Path, changes: dict[str, Any], message: str) -> None:
    add(models, LLAMA, b"some content", **changes)
    refused("llama3.2:1b", message)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": 3}', '{"layers": ["x"]}', "\xff"])
def test_manifests_that_are_none(models: Path, text: str) -> None:
    models.joinpath("manifests", *LLAMA).write_bytes(text.encode("latin-1"))
    refused("llama3.2:1b", "expected Ollama's manifest")


def test_a_blob_that_is_no_gguf_file(models: Path) -> None:
    blob = add(models, LLAMA, b"x" * 100)
    with pytest.raises(ValueError, match=f"{blob}: is no GGUF file"):
        load_model("ollama:llama3.2:1b")

"""llama3/seen.py: a weight file that changed since it was first read is named, by whichever stage reads it."""

import hashlib
import logging
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llama3 import load_model
from tests.conftest import Launch
from tests.tiny import tiny_llama

WEIGHTS = "consolidated.safetensors"


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA3_SAE_SEEN", str(tmp_path / "notes"))
    return tmp_path / "notes"


def flip(file: Path, touched: bool) -> None:
    """Change the lowest bit of the last number, as a disk does, or as somebody does."""
    status, raw = file.stat(), bytearray(file.read_bytes())
    raw[-4] ^= 1
    file.write_bytes(raw)
    time = status.st_mtime_ns + touched * 10**9
    os.utime(file, ns=(time, time))


def test_a_bit_that_flipped_by_itself_is_refused(tmp_path: Path, notes: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    for _ in range(2):
        load_model(folder)
    assert len(list(notes.iterdir())) == 1
    before = [note.read_bytes() for note in notes.iterdir()]
    flip(folder / WEIGHTS, touched=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"model/{WEIGHTS}: damaged: it holds something else than .* \(\d{{4}}-"):
            load_model(folder)
    assert [note.read_bytes() for note in notes.iterdir()] == before
    flip(folder / WEIGHTS, touched=False)
    load_model(folder)


def test_new_weights_in_an_old_place_are_said_once(tmp_path: Path, notes: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_llama(tmp_path / "model")
    load_model(folder)
    flip(folder / WEIGHTS, touched=True)
    for times in (1, 1):
        load_model(folder)
        assert caplog.text.count(f"model/{WEIGHTS} changed since it was first read here") == times
    os.utime(folder / WEIGHTS)
    load_model(folder)
    load_model(tiny_llama(tmp_path / "another", seed=1))
    assert caplog.text.count("changed since") == 1
    assert len(list(notes.iterdir())) == 2


@pytest.mark.parametrize("index", range(3))
def test_the_part_that_changed_is_named(tmp_path: Path, notes: Path, index: int) -> None:
    folder = tiny_llama(tmp_path / "model")
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    for part in range(3):
        save_file({name: weights[name] for name in names[part::3]}, folder / f"consolidated.{part:02d}.safetensors")
    load_model(folder)
    flip(folder / f"consolidated.{index:02d}.safetensors", touched=False)
    with pytest.raises(ValueError, match=rf"consolidated\.{index:02d}\.safetensors: damaged"):
        load_model(folder)


@pytest.mark.parametrize(
    "note", [b"", b"{", b"[]", b'{"consolidated.safetensors": 3}', b'{"consolidated.safetensors": {}}', b"\xff"]
)
def test_a_damaged_note_is_none(tmp_path: Path, notes: Path, note: bytes) -> None:
    folder = tiny_llama(tmp_path / "model")
    load_model(folder)
    (place,) = notes.iterdir()
    whole = place.read_bytes()
    place.write_bytes(note)
    load_model(folder)
    assert place.read_bytes() == whole


@pytest.mark.parametrize("how", ["empty", "a file in the way"])
def test_notes_that_cannot_be_kept_are_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA3_SAE_SEEN", "" if how == "empty" else str(tmp_path / "file" / "notes"))
    folder = tiny_llama(tmp_path / "model")
    load_model(folder)
    flip(folder / WEIGHTS, touched=False)
    load_model(folder)
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]


@pytest.mark.parametrize("prefix", ["", "sha256-"], ids=["Hub", "Ollama"])
def test_files_named_by_their_hash_are_checked_when_they_are_first_read(
    tmp_path: Path, notes: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder, blobs = tiny_llama(tmp_path / "models--a--b" / "snapshots" / "1"), tmp_path / "models--a--b" / "blobs"
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    blobs.mkdir()
    blob = (folder / WEIGHTS).rename(blobs / f"{prefix}{digest}")
    (folder / WEIGHTS).symlink_to(blob)
    flip(blob, touched=True)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: damaged: its SHA-256 is .*says {digest}"):
        load_model(folder)
    assert not notes.exists()
    flip(blob, touched=True)
    for _ in range(2):
        load_model(folder)
    assert caplog.text.count("with its SHA-256, once") == 2, "the refused one, the first good one, and no more"


def test_a_stage_names_the_model_file(tmp_path: Path, notes: Path, launch: Launch) -> None:
    folder = tiny_llama(tmp_path / "model")
    flags = ("-m", "inference.complete", "--model", folder, "--prompt", "the", "--max-new-tokens", "1", "--device", "cpu")
    assert launch(*flags).returncode == 0
    flip(folder / WEIGHTS, touched=False)
    done = launch(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder / WEIGHTS}: damaged")

"""Capture under faults that are no kills: damaged files, full disks, two jobs in one folder."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from capture import chunks, plan
from capture.batches import Batch, tokenise
from capture.chunks import ChunkCapture, NonFinite, start_chunk
from capture.store import open_activations, open_corpus
from core.files import locked
from llama3 import load_tokenizer
from tests.test_capture import FLAGS, SITES, capture, command, contents, how, write_corpus
from tests.test_sentences import stage
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `corpus` and `clean`, an uninterrupted run."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_llama(folder / "model")
    write_corpus(folder)
    capture(folder / "model", folder / "corpus", folder / "clean")
    return folder


# --- damage ----------------------------------------------------------------------------------------------------------------


def test_two_hundred_damaged_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    """100 flipped bits and 100 cuts over chunks, sentences, documents and manifests: each is refused by the file's name."""
    chance = random.Random(0)
    targets = {folder: [p for p in sorted((tiny / folder).rglob("*")) if p.is_file()] for folder in ("clean", "corpus")}
    for n in range(200):
        folder = chance.choice(["clean", "corpus"])
        original = chance.choice(targets[folder])
        copy = tmp_path / f"{folder}{n}"
        shutil.copytree(tiny / folder, copy)
        damaged = copy / original.relative_to(tiny / folder)
        content = bytearray(original.read_bytes())
        if n % 2:
            damaged.write_bytes(content[: chance.randrange(len(content))])
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            damaged.write_bytes(content)
        with pytest.raises(ValueError, match=damaged.name):
            read_everything(copy, folder)
        shutil.rmtree(copy)


def read_everything(path: Path, folder: str) -> None:
    if folder == "corpus":
        corpus = open_corpus(path)
        corpus.texts(range(corpus.n_sentences))
        corpus.document_names([0])
    else:
        for site in SITES:
            store = open_activations(path, site)
            for index in range(len(store)):
                store.chunk(index)


# --- NaN and Inf -----------------------------------------------------------------------------------------------------------


def test_nan_and_inf_at_thirty_points_are_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any row, dimension and site; and `skip` takes that sentence's rows away and no others."""
    corpus, tokenizer = open_corpus(tiny / "corpus"), load_tokenizer(tiny / "model")
    tokens = tokenise(corpus.rows(0, corpus.n_sentences), tokenizer, 90)
    strict, lenient = how(tiny), how(tiny, skip_nonfinite=True)
    plain, chance = chunks._forward, random.Random(0)
    whole = start_chunk(strict, tokens, lambda: None).result
    for _ in range(30):
        row, site, value = (
            chance.randrange(len(tokens.token_ids)),
            chance.choice(SITES),
            chance.choice([math.nan, math.inf, -math.inf]),
        )
        dimension = chance.randrange(32)

        def poisoned(how: ChunkCapture, batch: Batch) -> dict[str, torch.Tensor]:
            acts = plain(how, batch)
            acts[site][batch.rows == row, dimension] = value  # noqa: B023
            return acts

        monkeypatch.setattr(chunks, "_forward", poisoned)
        sentence = int(torch.searchsorted(tokens.offsets, row, right=True)) - 1
        begin, end = tokens.offsets[sentence : sentence + 2].tolist()
        named = f"sentence {int(tokens.sentence_ids[sentence])}, token {row - begin}: NaN or Inf at site {site}"
        with pytest.raises(NonFinite, match=re.escape(named)):
            start_chunk(strict, tokens, lambda: None).result  # noqa: B018
        left = start_chunk(lenient, tokens, lambda: None).result
        assert left.counts["nonfinite"] == 1
        for other in SITES:
            kept = torch.cat((whole.rows[other].activations[:begin], whole.rows[other].activations[end:]))
            assert torch.equal(left.rows[other].activations, kept)


# --- disks and rivals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up(
    tiny: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before it starts; and where the room is gone only later, stopped with path, needed and free bytes."""
    ballast = small_disk / "ballast"
    out = small_disk / "acts"
    arguments = ("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", out, *FLAGS)
    ballast.write_bytes(bytes(900 * 1024))
    with pytest.raises(SystemExit):
        command(*arguments)
    assert re.search(r"--out \S+: about 0.\d+ MB are needed .* and 0.\d+ MB are free", capsys.readouterr().err)
    assert not out.exists()
    monkeypatch.setattr(plan, "free", lambda path: 10**9)
    began = time.monotonic()
    with pytest.raises(SystemExit) as exit_:
        command(*arguments)
    assert exit_.value.code == 2
    assert time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert "disk full: writing " in said
    assert re.search(r"needs at least [\d,]+ bytes, [\d,]+ are free there", said)
    assert str(out) in said
    earlier = {name: content for name, content in contents(out).items() if name.endswith(".safetensors")}
    clean = contents(tiny / "clean")
    assert earlier
    assert all(clean[name] == content for name, content in earlier.items())
    ballast.unlink()
    command(*arguments)
    assert contents(out) == clean


def test_a_disk_that_fills_up_while_cutting(small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The corpus: the same, with the files of before unharmed and continued."""
    lines = [json.dumps({"text": " ".join(f"Sentence {i}, no. {j * i}, of some." for j in range(40))}) for i in range(400)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    flags = ("--source", tmp_path / "docs.jsonl", "--sentences-per-file", 2000, "--out")
    stage(*flags, tmp_path / "clean")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2**20 - 64 * 1024))
    with pytest.raises(SystemExit) as exit_:
        stage(*flags, small_disk / "corpus")
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert re.search(rf"disk full: writing {small_disk}/corpus\S+ needs at least [\d,]+ bytes, [\d,]+ are free there", said)
    earlier = list((small_disk / "corpus").glob("*.parquet"))
    assert earlier
    assert all(path.read_bytes() == (tmp_path / "clean" / path.name).read_bytes() for path in earlier)
    ballast.unlink()
    stage(*flags, small_disk / "corpus")
    assert contents(small_disk / "corpus") == contents(tmp_path / "clean")


def test_the_second_job_in_a_folder_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "acts"), pytest.raises(SystemExit):
        command("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", tmp_path / "acts", *FLAGS)
    assert f"another job is writing here (host {os.uname().nodename}, process {os.getpid()})" in capsys.readouterr().err

"""Cutting in several processes, passages of a number of tokens, and duplicates."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize.punkt import PunktSentenceTokenizer

from capture import cutting, duplicates, punkt
from capture.cutting import Cutting, cut
from capture.duplicates import Seen
from capture.passages import Passages
from capture.punkt import load_splitter
from capture.sources import Document
from capture.store import open_corpus
from llama3 import load_tokenizer
from tests.conftest import ROOT
from tests.processes import abandoned, group_members, shared_memory
from tests.test_sentences import contents, stage

TOKENIZER = load_tokenizer("demo")
WORDS = ("The", "dog", "Mr", "U.S", "e.g", "No", "Then", "ran", "J", "3.5", "etc", "She")
SENTENCES = Cutting(unit="sentence", punkt="builtin", language="english", lines="auto", tokens=64, tokenizer="demo")


def documents(n: int) -> list[Document]:
    return [Document(f"d{i}", "s", " ".join(f"Sentence {j} of {i}." for j in range(i % 7)), None) for i in range(n)]


@settings(max_examples=80, deadline=None)
@given(st.text("ab éZ.,\n\t日", max_size=300) | st.text(max_size=60), st.integers(1, 9))
def test_passages_lose_nothing_and_keep_their_limit(text: str, n_tokens: int) -> None:
    found = list(Passages(TOKENIZER, n_tokens).units(text))
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(passage == passage.strip() != "" and passage in text for passage in found)
    for passage in found:
        assert len(TOKENIZER.encode(passage)) <= n_tokens or len(passage.split()) == 1


def test_passages_are_as_long_as_the_next_word_allows() -> None:
    text = " ".join(f"word{i} is here, and so on." for i in range(300))
    found = list(Passages(TOKENIZER, 64).units(text))
    lengths = [len(TOKENIZER.encode(passage)) for passage in found]
    assert " ".join(found) == text
    assert max(lengths) <= 64
    assert min(lengths[:-1]) > 56


def test_two_processes_cut_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "BATCH_CHARACTERS", 60)
    given = documents(60)
    alone = list(cut(iter(given), SENTENCES, 1))
    assert list(cut(iter(given), SENTENCES, 2)) == alone
    assert [found.document for found in alone] == given


def test_a_corpus_of_passages_without_duplicates(tmp_path: Path) -> None:
    texts = ["One and two and three and four and five and six and seven.", "Another text.", "Another text."]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ("--source", tmp_path / "t.jsonl", "--unit", "passage", "--tokens", 6, "--deduplicate")
    stage(*flags, "--out", tmp_path / "c")
    corpus = open_corpus(tmp_path / "c")
    found = corpus.texts(range(corpus.n_sentences))
    assert " ".join(found) == "One and two and three and four and five and six and seven. Another text."
    assert all(len(TOKENIZER.encode(text)) <= 6 for text in found)
    counts = corpus.artifact.manifest.counts
    assert (counts["documents"], counts["dropped_duplicate"]) == (3, 1)
    stage(*flags, "--out", tmp_path / "c2", "--processes", 2)
    assert contents(tmp_path / "c2") == contents(tmp_path / "c")


def test_documents_that_are_cut_already_stay_as_they_are(tmp_path: Path) -> None:
    texts = ["Two sentences. In one row.", "Another row.", "", "  and one with space around it "]
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    stage("--source", tmp_path / "t.parquet", "--unit", "document", "--out", tmp_path / "c", "--min-characters", 1)
    corpus = open_corpus(tmp_path / "c")
    assert corpus.texts(range(corpus.n_sentences)) == [texts[0], texts[1], texts[3].strip()]
    assert corpus.document_ids(range(corpus.n_sentences)) == [0, 1, 3]
    assert "punkt_hash" not in corpus.artifact.manifest.provenance


def test_seen_is_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "RECENT", 5)
    seen, plain = Seen(), set()
    for i in [*range(12), *range(20), *range(7, 30, 3)]:
        assert seen.add(str(i)) == (i not in plain)
        plain.add(i)


def start_long_cut(folder: Path) -> "subprocess.Popen[str]":
    """The stage with two processes on a text that takes some minutes, once it has come to work."""
    line = json.dumps({"text": "This is a sentence of Dr. Who. " * 3000}) + "\n"
    (folder / "long.jsonl").write_text(line * 400)
    job = subprocess.Popen(
        [sys.executable, "-m", "capture.sentences", "--source", folder / "long.jsonl", "--out", folder / "c",
         "--processes", "2", "--sentences-per-file", "2000"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while job.poll() is None and not list((folder / "c").glob("*.parquet")):
        time.sleep(0.05)
    assert job.poll() is None
    return job


def wait_until_gone(job: "subprocess.Popen[str]", limit: float) -> None:
    ends = time.monotonic() + limit
    while group_members(job.pid) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not group_members(job.pid)


def test_killed_processes_are_noticed_and_leave_no_orphans(tmp_path: Path) -> None:
    """A killed process of the pool ends the job with a message; a killed job ends the pool."""
    job = start_long_cut(tmp_path)
    workers = [pid for pid in group_members(job.pid) if b"capture.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, said = job.communicate(timeout=10)
    assert job.returncode == 2
    assert "a process that cuts the text ended" in said
    wait_until_gone(job, 10)
    for file in (tmp_path / "c").iterdir():
        file.unlink()
    job = start_long_cut(tmp_path)
    job.kill()
    job.communicate(timeout=10)
    wait_until_gone(job, 10)


def punkt_without_windows(text: str) -> list[str]:
    """NLTK's own patterns over the whole paragraph at once, as the slow twin."""
    splitter = load_splitter()
    splitter._punkt = PunktSentenceTokenizer(splitter._punkt._params)
    spans = punkt._joined(text, list(splitter._punkt.span_tokenize(text)))
    return [sentence for start, end in spans if (sentence := text[start:end].strip())]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS, *(f"{word}." for word in WORDS), "No. 5", "Why?", "(so.)", '"Yes!"', "--"]), max_size=60)
)
def test_windows_cut_as_one_look_does(words: list[str]) -> None:
    text = " ".join(words)
    with pytest.MonkeyPatch.context() as patch:
        expected = punkt_without_windows(text)
        assert list(load_splitter().sentences(text, "paragraphs")) == expected
        patch.setattr(punkt, "WINDOW", 150)
        assert list(load_splitter().sentences(text, "paragraphs")) == expected or max(map(len, expected)) > 60


@pytest.mark.parametrize("unit", ["a. ", "? ", ". ", "a.) ", "Mr. ", "x", "x ", "-", ".", "日", "。", '."', " "])
def test_texts_of_any_one_thing_are_cut_whatever_their_length(unit: str) -> None:
    """None is looked at for longer because it is longer, nothing is lost, and no sentence exceeds a window."""
    text = "A row of dots " + unit * (300_000 // len(unit)) + "12"
    found = list(load_splitter().sentences(text))
    assert "".join("".join(found).split()) == "".join(text.split())
    assert max(map(len, found)) <= punkt.WINDOW


def test_no_clock_ends_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    redos = pytest.importorskip("nltk.redos", reason="NLTK before 3.10 has no clock")
    monkeypatch.setattr(redos, "DEFAULT_TIMEOUT", 1e-9)
    text = "Word word. " * 2000
    with pytest.raises(TimeoutError):
        punkt_without_windows(text)
    assert len(list(load_splitter().sentences(text))) == 2000


@pytest.mark.parametrize("processes", [1, 2])
def test_a_document_that_cannot_be_cut_is_named(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    how = replace(SENTENCES, unit="passage", tokens="many")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"document d3 \(50 characters\) cannot be cut: TypeError"):
        list(cut(iter(documents(4)[3:]), how, processes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("今天天气很好。我们去公园吧！你来吗？", ["今天天气很好。", "我们去公园吧！", "你来吗？"]),
        ("「行きましょう。」そう言った。", ["「行きましょう。」", "そう言った。"]),
        ("वह घर गया। वह सो गया।", ["वह घर गया।", "वह सो गया।"]),
        ("كيف حالك؟ أنا بخير.", ["كيف حالك؟", "أنا بخير."]),
        ("I said 好。 Then I left. Done.", ["I said 好。", "Then I left.", "Done."]),
    ],
)
def test_marks_of_scripts_without_spaces_end_sentences(text: str, expected: list[str]) -> None:
    assert list(load_splitter().sentences(text)) == expected


def test_a_killed_job_leaves_nothing_even_while_its_processes_start(tmp_path: Path) -> None:
    before = shared_memory()
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "A sentence. " * 3000}) + "\n")
    job = subprocess.Popen(
        [sys.executable, "-m", "capture.sentences", "--source", tmp_path / "t.jsonl", "--out", tmp_path / "c", "--processes=2"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while job.poll() is None and len(group_members(job.pid)) < 3:
        time.sleep(0.02)
    assert job.poll() is None
    job.kill()
    job.wait()
    wait_until_gone(job, 5)
    assert not abandoned(before)

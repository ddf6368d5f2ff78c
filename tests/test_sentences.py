"""Sources, sentence splitting and the stage that writes a corpus folder."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import nltk
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize.punkt import PunktParameters

from capture import characters, listing, punkt, sentences, sources
from capture.punkt import load_splitter
from capture.sentences import SentencesConfig
from capture.sources import Document, open_source
from capture.store import open_corpus
from core import files
from core.cli import one_line_errors, parse
from core.runtime import Runtime, Solo
from tests.faults import ForkServer, fail_at

SPLITTER = load_splitter()

# A bar stands where a sentence ends.
HARD = """The U.S. President, Mr. Truman, spoke first.|Nobody answered.
Dr. Long examined the patient at 5 p.m. and left.|The nurse stayed.
She moved to the U.S. in 1998.|He stayed in the U.K. until 2003.
He lives in Washington, D.C.|She lives in New York.
Use a sorted container, e.g. a list or a tuple.|Sets have no order.
Some functions, i.e. the pure ones, can be cached.|Others cannot.
Bring pens, paper, etc. and be on time.
We sell apples, pears, plums, etc.|The shop opens at nine.
J. R. R. Tolkien wrote it.|C. S. Lewis read it.
Harry S. Truman and John F. Kennedy were presidents.
George W. Bush spoke at 3.30 p.m. on Monday.
Python 3.11.7 was released.|It fixes two bugs.
The value of pi is 3.14159.|It is irrational.
Prices rose by 2.5 percent in Jan. 2020 and fell by 1.5 percent in Feb. 2021.
See https://example.com/a.html?x=1.5&y=2 for details.|The page is short.
Write to info@example.co.uk or visit www.example.com.|We answer within a day.
"I am tired," she said.|"So am I."
"Why?" he asked.|"Because it rains," she said.
"Stop!" cried the guard.|Nobody moved.
He said, "I will go."|Then he left.
Well... maybe not.|Let us see.
He waited... and waited.
She opened the door (it was not locked.) and went in.
(This is a remark.)|This is not.
See Fig. 3 and Sec. 4.2 for the proof.|It is due to Gauss et al. and is short.
No. 5 is alive.|He said no.|Maria left.
Acme Inc. and Bolt Ltd. merged in Dec. 1999.|Their rivals laughed.
Prof. Smith, Ph.D., of St. Mary's taught Mrs. Jones vs. Mr. Brown.
Is it true?|Yes!|I saw it.
The file is called setup.py and the class torch.nn.Module is in it.|Open both.
Gen. Grant met Lt. Col. Parker at Ft. Sumter on Apr. 3.|It rained.
Cf. Smith (1999), pp. 12-14, vol. 2, no. 3.|The result is old.
The temperature fell to -3.5 degrees.|Five people came.
What is a U.F.O. sighting worth?|Little.
The Rev. Martin Luther King Jr. spoke on Aug. 28.|Everyone listened.
She got a B.A. in 1990 and a Ph.D. in 1995.|Then she taught.
The train leaves at 6 a.m.|We must hurry.
The answer is option B.|Then we went on.
Mr. and Mrs. Hall own the house on 5th Ave. and the farm.
Did he say "No."?|She could not tell.
He paid $4.50 for it.|That was too much.
Call os.path.join.|It returns a string.
‘It’s late,’ said Ann.|‘Go home.’""".splitlines()


@pytest.mark.parametrize("marked", HARD)
def test_hard_sentences(marked: str) -> None:
    assert list(SPLITTER.sentences(marked.replace("|", " "))) == marked.split("|")


def test_untrained_punkt_fails_where_ours_does_not() -> None:
    untrained = punkt.Splitter(PunktParameters(), joins=False)
    text = "The U.S. President, Mr. Truman, spoke first."
    assert list(untrained.sentences(text)) == ["The U.S.", "President, Mr.", "Truman, spoke first."]


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        ("A title\n\nOne. Two.", "auto", ["A title", "One.", "Two."]),
        ("First line.\nSecond line.\nThird", "auto", ["First line.", "Second line.", "Third"]),
        ("The first\nline goes on\nto here. Then\n  it ends.", "auto", ["The first line goes on to here.", "Then it ends."]),
        ("A title\nThe text below it. It goes on.", "auto", ["A title", "The text below it.", "It goes on."]),
        ("One\ntwo\n \t\nthree", "wrapped", ["One two", "three"]),
        ("One\ntwo", "paragraphs", ["One", "two"]),
        ("  \n\n \t ", "auto", []),
        ("", "auto", []),
    ],
)  # fmt: skip
def test_line_breaks(text: str, lines: punkt.Lines, expected: list[str]) -> None:
    assert list(SPLITTER.sentences(text, lines)) == expected


def test_nothing_but_white_space_is_lost() -> None:
    text = " ".join(marked.replace("|", " ") for marked in HARD)
    assert "".join("".join(SPLITTER.sentences(text)).split()) == "".join(text.split())


@settings(max_examples=150, deadline=None)
@given(st.text("Aab1.?!\"'’“()[] \n\t,;-…é", max_size=60), st.sampled_from(["auto", "paragraphs", "wrapped"]))
def test_any_text_is_cut_without_loss(text: str, lines: punkt.Lines) -> None:
    found = list(SPLITTER.sentences(text, lines))
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in found)


def test_training_is_deterministic_and_learns(tmp_path: Path) -> None:
    documents = [Document(f"d{i}", "s", f"He met A.K.A. number {i}. The dog ran. It barked. the end", None) for i in range(40)]
    model = punkt._as_json(punkt.train(documents, 2000))
    assert model == punkt._as_json(punkt.train(reversed(documents), 2000))
    again = punkt._as_json(punkt._from_json(json.loads(json.dumps(model))))
    assert json.dumps(again) == json.dumps(model)
    assert "a.k.a" in model["abbreviations"].split()
    assert "mr" in model["abbreviations"].split()


def test_pretrained_punkt_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ValueError, match=r"nltk.downloader punkt_tab"):
        load_splitter("pretrained")
    with pytest.raises(ValueError, match="--punkt pretrained"):
        load_splitter("builtin", "german")


# --- sources ---------------------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_folder_is_read_by_path(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    write(texts / "b.txt", "\ufeffB text\r\nsecond line")
    write(texts / "a" / "z.txt", "Z text")
    write(texts / "c.jsonl", '{"text": "C1", "label": 3}\n\n{"text": "C2", "name": "two", "source": "web"}\n')
    write(texts / ".hidden.txt", "hidden")
    write(texts / "picture.png", b"\x89PNG")
    write(texts / "out" / "manifest.json", "{}")
    write(texts / "out" / "o.txt", "the output of a stage")
    assert list(open_source(str(texts))) == [
        ("a/z.txt", "texts", "Z text", None),
        ("b.txt", "texts", "B text\nsecond line", None),
        ("c.jsonl:1", "texts", "C1", "3"),
        ("two", "web", "C2", None),
    ]


def test_parquet_and_compressed_files(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "label": [None, "x"], "other": [1, 2]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert list(open_source(str(tmp_path / "t.parquet"))) == [
        ("t.parquet:0", "t.parquet", "one", None),
        ("t.parquet:1", "t.parquet", "two", "x"),
    ]
    write(tmp_path / "t.txt.gz", gzip.compress("größer".encode("latin-1")))
    assert [d.text for d in open_source(str(tmp_path / "t.txt.gz"), "latin-1")] == ["größer"]
    with pa.output_stream(tmp_path / "t.jsonl.zst", compression="zstd") as file:
        file.write(b'{"text": "packed"}')
    assert [d.text for d in open_source(str(tmp_path / "t.jsonl.zst"))] == ["packed"]


def test_long_texts_are_cut_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART_CHARACTERS", 300)
    monkeypatch.setattr(characters, "READ_BYTES", 7)  # cuts inside characters, too
    paragraphs = [f"Paragraph {i} is für us.\nIts second line." for i in range(40)]
    path = write(tmp_path / "book.txt", "\n\n".join(paragraphs))
    documents = list(open_source(str(path)))
    assert [d.name for d in documents] == [f"book.txt#{i + 1}" for i in range(len(documents))]
    assert len(documents) > 5
    assert max(len(d.text) for d in documents) <= 300
    assert "\n\n".join(d.text for d in documents) == "\n\n".join(paragraphs)
    words = write(tmp_path / "words.txt", "word " * 500 + "x" * 1000)
    assert "".join("".join(d.text.split()) for d in open_source(str(words))) == "word" * 500 + "x" * 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"abc \xff def", r"t\.txt: not utf-8: .* at byte 4; .*--encoding"),
        ("t.txt", b"abc \xe2\x82", r"t\.txt: not utf-8: unexpected end of data at byte 4"),
        ("t.txt", "é".encode() * 10 + b"\xff", "at byte 20;"),
        ("t.jsonl", '{"text": "a"}\n{"tex": "b"}', "t.jsonl: line 2 has no text"),
        ("t.jsonl", '{"text": "a"}\n{"text": ', "t.jsonl: line 2 is not JSON"),
        ("t.jsonl", "[1]", "t.jsonl: line 1 is not an object"),
        ("t.jsonl", '{"text": "\\ud83d"}', r"line 1 holds U\+D83D"),
        ("t.parquet", "no parquet", "t.parquet: not a readable Parquet file"),
        ("t.txt.gz", "no gzip", "t.txt.gz: cannot be read"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_by_name_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, message: str
) -> None:
    monkeypatch.setattr(characters, "READ_BYTES", 3)
    with pytest.raises(ValueError, match=message):
        list(open_source(str(write(tmp_path / name, content))))


@pytest.fixture
def memory_files() -> Iterator[fsspec.AbstractFileSystem]:
    """A file system in memory, at memory://."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_addresses_read_as_local_folders_do(
    tmp_path: Path, memory_files: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PRESETS", {"hf://preset": "memory://texts/*.parquet"})
    table = pa.table({"sentence": ["one", "two"], "text": ["eins", "zwei"]})
    local = tmp_path / "texts"
    write(local / "b.jsonl.gz", gzip.compress(b'{"text": "packed"}\n'))
    write(local / "a" / "t.txt", "A text.")
    pq.write_table(table, local / "c.parquet")
    write(local / "picture.png", b"\x89PNG")
    for file in local.rglob("*.*"):
        memory_files.pipe(f"/texts/{file.relative_to(local).as_posix()}", file.read_bytes())
    remote = list(open_source("memory://texts"))
    assert [d._replace(source="texts") for d in remote] == list(open_source(str(local)))
    assert {d.source for d in remote} == {"memory://texts"}
    assert [d.text for d in open_source("hf://preset", text_key="sentence")] == ["one", "two"]
    assert [d.text for d in open_source("memory://texts/a/t.txt")] == ["A text."]
    for wrong, message in (
        ("memory://nothing", "holds no .txt"),
        ("none://texts", "cannot be listed"),
        ("memory://texts/*.csv", "holds no .txt"),
    ):
        with pytest.raises(ValueError, match=message):
            list(open_source(wrong))
    memory_files.pipe("/bad/x.jsonl", b"[1]")
    with pytest.raises(ValueError, match=r"memory://.*bad/x.jsonl: line 1 is not an object"):
        list(open_source("memory://bad"))


def test_errors_of_a_store_are_one_line(memory_files: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever class the backend raises: that of `hf://` without a network is no OSError."""
    memory_files.pipe("/texts/a.txt", b"A text.")

    def unreachable(self: object, *args: object, **kwargs: object) -> None:
        raise LookupError("name not known")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory_files), "open", unreachable)
        with pytest.raises(OSError, match=r"texts/a.txt: cannot be read: name not known; the same command continues"):
            list(open_source("memory://texts"))
    monkeypatch.setattr(type(memory_files), "find", unreachable)
    with pytest.raises(ValueError, match="memory://texts: cannot be listed: name not known"):
        list(open_source("memory://texts"))


def test_presets_are_addresses_that_fsspec_takes_apart() -> None:
    for preset, address in listing.PRESETS.items():
        assert preset.startswith("hf://")
        system, path = fsspec.core.url_to_fs(address)
        assert type(system).__name__ == "HfFileSystem"
        assert path.startswith("datasets/")


def test_a_remote_source_is_told_by_its_listing(
    memory_files: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_files.pipe("/texts/a.txt", b"A text.")
    assert listing.source_version("memory://texts") is None  # this store names no content: it is read
    plain = type(memory_files).find

    def with_hashes(self: fsspec.AbstractFileSystem, path: str, detail: bool = False) -> dict[str, dict[str, object]]:
        return {name: info | {"blob_id": "b1"} for name, info in plain(self, path, detail=True).items()}

    monkeypatch.setattr(type(memory_files), "find", with_hashes)
    first = listing.source_version("memory://texts")
    assert first
    memory_files.pipe("/texts/b.txt", b"Another.")
    assert listing.source_version("memory://texts") not in (None, first)


def test_nltk_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "corpora" / "inaugural" / "1789-Washington.txt", "Fellow citizens: caf\xe9.".encode("latin-1"))
    write(tmp_path / "corpora" / "movie_reviews" / "pos" / "cv1.txt", "good film .")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    inaugural = open_source("nltk:inaugural")
    assert list(inaugural) == [("1789-Washington.txt", "nltk:inaugural", "Fellow citizens: café.", None)]
    assert list(open_source("nltk:movie_reviews")) == [("pos/cv1.txt", "nltk:movie_reviews", "good film .", "pos")]
    with pytest.raises(ValueError, match="knows no corpus"):
        list(open_source("nltk:nothing"))

    def no_network(*args: object, **kwargs: object) -> None:
        raise ValueError("no route to host")

    monkeypatch.setattr(nltk, "download", no_network)
    with pytest.raises(
        ValueError, match=r"could not fetch it \(no route to host\); with a network, `python -m nltk.downloader webtext`"
    ):
        list(open_source("nltk:webtext"))


# --- the stage -------------------------------------------------------------------------------------------------------------


def stage(*arguments: object) -> None:
    """The stage in this process, as its command line would run it."""
    with one_line_errors():
        config = parse(SentencesConfig, "", [str(argument) for argument in arguments])
        sentences.run(config, Runtime(0, 1, torch.device("cpu"), Solo()))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    lines = [
        {
            "name": f"doc{i}",
            "label": f"l{i % 2}" if i % 3 else None,
            "text": " ".join(f"Sentence {j} of {i}." for j in range(i + 1)) + " No.",
        }
        for i in range(9)
    ]
    return write(tmp_path / "docs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def test_corpus_folder(texts: Path, tmp_path: Path) -> None:
    stage("--source", texts, "--out", tmp_path / "c", "--sentences-per-file", 10)
    corpus = open_corpus(tmp_path / "c")
    assert (corpus.n_sentences, corpus.n_documents) == (45, 9)
    assert corpus.artifact.manifest.counts == {"sentences": 45, "documents": 9, "dropped_short": 9, "dropped_duplicate": 0}
    assert [corpus.table(i).num_rows for i in range(len(corpus.files))] == [10, 10, 10, 10, 5]
    expected = [(i, f"Sentence {j} of {i}.") for i in range(9) for j in range(i + 1)]
    rows = [row for i in range(len(corpus.files)) for row in corpus.table(i).to_pylist()]
    assert [row["sentence_id"] for row in rows] == list(range(45))
    assert [(row["document_id"], row["text"]) for row in rows] == expected
    assert [row["label"] for row in rows] == [f"l{i % 2}" if i % 3 else None for i, _ in expected]
    assert corpus.document_names([8, 0, 8]) == ["doc8", "doc0", "doc8"]
    assert "docs.jsonl" in corpus.artifact.manifest.provenance.values()
    assert str(tmp_path) not in (tmp_path / "c" / "manifest.json").read_text()


def test_same_bytes_again_and_nothing_rewritten_when_complete(texts: Path, tmp_path: Path) -> None:
    stage("--source", texts, "--out", tmp_path / "a")
    stage("--source", texts, "--out", tmp_path / "b")
    before = contents(tmp_path / "a")
    assert contents(tmp_path / "b") == before
    stage("--source", texts, "--out", tmp_path / "a")
    assert contents(tmp_path / "a") == before


def test_a_fault_at_a_file_operation_then_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    flags = ("--source", texts, "--sentences-per-file", 20, "--out")
    operations: list[str] = []
    files.before_operation = fail_at(0, operations)
    stage(*flags, tmp_path / "clean")
    clean = contents(tmp_path / "clean")
    for n in range(1, len(operations) + 1, 5):
        out = tmp_path / f"fault{n}"
        files.before_operation = fail_at(n)
        with pytest.raises(SystemExit):
            stage(*flags, out)
        files.before_operation = fail_at(0)
        stage(*flags, out)
        assert contents(out) == clean


def test_max_sentences_and_a_corpus_of_one_sentence(texts: Path, tmp_path: Path) -> None:
    stage("--source", texts, "--out", tmp_path / "few", "--max-sentences", 4)
    few = open_corpus(tmp_path / "few")
    assert few.texts(range(4)) == ["Sentence 0 of 0.", "Sentence 0 of 1.", "Sentence 1 of 1.", "Sentence 0 of 2."]
    assert (few.n_sentences, few.n_documents) == (4, 3)
    stage("--source", write(tmp_path / "one.txt", "Only one sentence here."), "--out", tmp_path / "one")
    assert open_corpus(tmp_path / "one").texts([0]) == ["Only one sentence here."]


def test_first_documents_without_a_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", '{"text": "No."}\n{"text": ""}\n{"text": "A whole sentence."}\n')
    stage("--source", path, "--out", tmp_path / "c")
    corpus = open_corpus(tmp_path / "c")
    assert corpus.table(0).to_pylist() == [{"sentence_id": 0, "document_id": 2, "text": "A whole sentence.", "label": None}]


Prepare = Callable[[Path], list[object]]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: ["--source", d / "none"], "no such file or folder; expected a text file"),
        (lambda d: ["--source", write(d / "e.txt", " \n ")], "empty: it holds no sentence of at least 8 characters"),
        (lambda d: ["--source", write(d / "x" / "t.md", "Text.").parent], "holds no .txt, .*, found 1 of .md"),
        (lambda d: ["--source", write(d / "l.txt", "caf\xe9 in latin".encode("latin-1"))], "l.txt: not utf-8"),
        (lambda d: ["--source", write(d / "s" / "manifest.json", "{}").parent], "the output of a stage"),
        (lambda d: ["--source", write(d / "t.txt", "A sentence."), "--encoding", "utf-9"], "'utf-9': no such encoding"),
        (lambda d: ["--source", write(d / "t.txt", "A sentence."), "--sentences-per-file", 0], "--sentences-per-file 0: exp"),
        (lambda d: ["--source", write(d / "t.txt", "A sentence."), "--sentence", 0], "sentence"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Prepare, message: str
) -> None:
    arguments = prepare(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        stage(*arguments, "--out", tmp_path / "out")
    assert exit_.value.code == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said)
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_source_under_the_same_name_is_refused(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage("--source", texts, "--out", tmp_path / "c")
    before = contents(tmp_path / "c")
    other = write(tmp_path / "other" / "docs.jsonl", '{"text": "Another text altogether."}')
    with pytest.raises(SystemExit):
        stage("--source", other, "--out", tmp_path / "c")
    assert "source_hash" in capsys.readouterr().err
    assert contents(tmp_path / "c") == before


def test_two_ranks_write_what_one_does(texts: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    flags = ("--source", texts, "--threads", 1, "--device", "cpu")
    done = fork_server.ranks(2, "capture.sentences", *flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    stage(*flags, "--out", tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

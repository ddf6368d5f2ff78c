"""Files of rows: every suffix, what is broken in them, and rows without a text."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import characters
from capture.sources import open_source
from capture.store import open_corpus
from tests.conftest import ROOT
from tests.test_core_text import DEEP
from tests.test_sentences import contents, stage, write

ROWS: list[dict[str, Any]] = [{"text": "One, with a comma.", "label": "x"}, {"text": 'Two "quoted"\nlines.', "label": "y"}]


def texts(path: Path, **how: Any) -> list[str]:
    return [document.text for document in open_source(str(path), **how)]


def csv_text(rows: list[dict[str, Any]]) -> str:
    return "label,text\r\n" + "".join('{label},"{}"\r\n'.format(row["text"].replace('"', '""'), **row) for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.ndjson", "\n".join(map(json.dumps, ROWS))),
        ("t.json", "\n".join(map(json.dumps, ROWS))),
        ("t.json", json.dumps(ROWS)),
        ("t.json", " \n" + json.dumps(ROWS, indent=2) + "\n"),
        ("t.csv", csv_text(ROWS)),
        ("t.tsv", csv_text(ROWS).replace("label,text", "label\ttext").replace("x,", "x\t").replace("y,", "y\t")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [3, 2**20])
def test_json_and_csv_are_read_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, packed: bool, block: int
) -> None:
    monkeypatch.setattr(characters, "READ_BYTES", block)
    data = ("\ufeff" + content).encode()
    path = write(tmp_path / (f"{name}.gz" if packed else name), gzip.compress(data) + b"\0" * 700 if packed else data)
    assert [(d.text, d.label) for d in open_source(str(path))] == [(row["text"], row["label"]) for row in ROWS]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({"text": st.text(max_size=20), "n": st.integers() | st.lists(st.text(max_size=3))})))
def test_an_array_in_blocks_is_what_json_makes_of_it(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(characters, "READ_BYTES", 5)
        for text in (json.dumps(rows), json.dumps(rows, indent=1)):
            assert texts(write(Path(folder) / "t.json", text)) == [row["text"] for row in json.loads(text)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.html", "<p>Text</p>", r"t\.html: \.html is not text"),
        ("t.html.gz", gzip.compress(b"<p>Text</p>"), r"t\.html\.gz: \.html is not text"),
        ("t.txt", b"%PDF-1.7 abc", "t.txt: is a PDF"),
        ("t.txt", gzip.compress(b"text"), "t.txt: is packed by gzip"),
        ("t.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-5], "t.jsonl.gz: cannot be read"),
        ("t.txt.gz", gzip.compress(b"text") + b"rubbish", "t.txt.gz: cannot be read"),
        ("t.jsonl", '{"text": "a"}\n' + DEEP, r"t\.jsonl: line 2 .*nested"),
        ("t.json", '[{"text": "a"},\n' + DEEP + "]", r"t\.json: item 2 .*nested"),
        ("t.json", '[{"text": "a"} {"text": "b"}]', r"t\.json: not JSON: expected , or \]"),
        ("t.json", '[{"text": "a"}', r"t\.json: not JSON: .* found its end"),
        ("t.json", '[{"text": "a"}, ', r"t\.json: item 2 is not JSON"),
        ("t.json", '[{"text": "a"}] x', r"t\.json: 'x' stands behind"),
        ("t.json", '[{"text": "a"}, [1]]', r"t\.json: item 2 is not an object"),
        ("t.json", '{\n"text": "a"\n}', r"t\.json: line 1 is not JSON"),
        ("t.jsonl", '{"text": "a", "m": {"text": 1}}\n{"text": "a", "text": ""}', r"t\.jsonl: line 2 has 'text' twice"),
        ("t.csv", "text,label\na\n", r"t\.csv: line 2 has 1 fields"),
        ("t.csv", 'text\n"a\nb"\n"c', r"t\.csv: line 4 is not CSV"),
        ("t.csv", "text,text\na,b\n", r"t\.csv has 'text' twice"),
        ("t.csv", "a,b\n1,2\n", r"t\.csv: has no column 'text'; it has a, b"),
        ("t.jsonl", '{"tex": "b"}', r"t\.jsonl: line 1 has no text: .* the keys tex"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named_with_file_and_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        texts(write(tmp_path / name, content))


def test_a_line_or_an_item_may_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters, "MAX_LINE", 50)
    monkeypatch.setattr(characters, "READ_BYTES", 16)
    row = json.dumps({"text": "a" * 60})
    for name, content, place in (
        ("t.jsonl", '{"text": "a"}\n' + row, "line 2"),
        ("t.json", f'[{{"text": "a"}}, {row}]', "item 2"),
        ("t.csv", "text\n" + "\n".join(["a"] * 5) + "\n" + "b" * 60, "line 7"),
        ("u.csv", "text\n" + '"' + "b\n" * 60, "line 2"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: {place} .*(longer than 50|larger than field limit)"):
            texts(write(tmp_path / name, content))


# --- Parquet ------------------------------------------------------------------------------------------------------------------


def test_a_string_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    strings = [b"one", "zw\u00f6lf".encode("latin-1"), None]
    column = pa.array([*strings, *(f"row {i}".encode() for i in range(3000))]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet", use_dictionary=False)
    with pytest.raises(ValueError, match=r"t\.parquet: row 1: 'text' is not UTF-8 .*byte 2"):
        texts(tmp_path / "t.parquet")


def test_damaged_bytes_name_the_rows_from_which_on(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"text": [f"sentence {i} is {i * i}" for i in range(20_000)]})
    pq.write_table(table, path, compression="snappy", row_group_size=5000)
    data = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    data[middle + 40 : middle + 400] = b"\xff" * 360
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"t\.parquet: cannot be read from row [1-9][\d,]* on"):
        texts(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet has 'text' twice"):
        texts(tmp_path / "t.parquet")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("shared", [True, False])
def test_parquet_strings_of_every_kind(tmp_path: Path, kind: pa.DataType, shared: bool) -> None:
    found = ["one", "two", "one", "", "\u00e9"] * 700
    table = pa.table({"text": pa.array(found).cast(kind), "label": pa.array(range(len(found)))})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=shared, row_group_size=1000)
    documents = list(open_source(str(tmp_path / "t.parquet")))
    assert [d.text for d in documents] == found
    assert [d.label for d in documents] == [str(i) for i in range(len(found))]


def peak_mb(*arguments: object) -> tuple[int, str]:
    """Most memory of a process of ours, in MB, and what it said."""
    code = (
        "import sys, resource; from capture.sources import open_source\n"
        "n = size = 0\n"
        "try:\n"
        "    for document in open_source(sys.argv[1]):\n"
        "        n, size = n + 1, size + len(document.text)\n"
        "        if n == int(sys.argv[2]): break\n"
        "    print(n, size)\n"
        "except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *said, peak = done.stdout.splitlines()
    return int(peak) // 1024, " ".join(said)


def test_a_parquet_bomb_takes_no_more_memory_than_its_longest_rows(tmp_path: Path) -> None:
    """A file of some KB whose rows are 4 GB: once each text stands in it once, once again and again."""
    text = "A sentence. " * 350_000  # 4.2 MB
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), [text])
    pq.write_table(pa.table({"text": rows}), tmp_path / "shared.parquet", compression="zstd", store_schema=False)
    plain = pa.table({"text": [text] * 60})
    pq.write_table(plain, tmp_path / "plain.parquet", compression="zstd", use_dictionary=False)
    base, _ = peak_mb(write(tmp_path / "small.txt", "Text."), -1)
    for name in ("shared", "plain"):
        assert (tmp_path / f"{name}.parquet").stat().st_size < 2**19
        peak, said = peak_mb(tmp_path / f"{name}.parquet", 50)
        assert said == f"50 {50 * len(text)}"
        assert peak - base < 500, name


def test_a_gzip_bomb_ends_at_the_longest_line(tmp_path: Path) -> None:
    """400 MB of one line in some 400 KB, and 400 MB of text, of which no more than a part is in memory."""
    base, _ = peak_mb(write(tmp_path / "small.txt", "Text."), -1)
    for name, begin in (("t.jsonl.gz", b'{"text": "'), ("t.txt.gz", b"")):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            file.write(begin)
            for _ in range(100):
                file.write(b"word " * 800_000)
    peak, said = peak_mb(tmp_path / "t.jsonl.gz", -1)
    assert "line 1 is longer than 134,217,728 characters" in said
    assert peak - base < 400
    peak, said = peak_mb(tmp_path / "t.txt.gz", -1)
    assert int(said.split()[0]) > 6000
    assert peak - base < 60


# --- rows without a text, names without a spelling ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_without_a_text_are_counted_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    rows: list[str | None] = [None, "The first sentence.", None, None, "The second sentence.", "The third sentence.", None]
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": rows}), path)
    else:
        objects = [{"text": row} for row in rows]
        write(path, "\n".join(map(json.dumps, objects)) if suffix == "jsonl" else json.dumps(objects))
    stage("--source", path, "--out", tmp_path / "c")
    corpus = open_corpus(tmp_path / "c")
    assert corpus.texts(range(corpus.n_sentences)) == [row for row in rows if row]
    assert corpus.n_documents == 3
    assert corpus.artifact.manifest.counts["dropped_null"] == 4
    with pytest.raises(SystemExit):
        stage("--source", path, "--out", tmp_path / "d", "--nulls", "refuse")
    assert f"t.{suffix}: " in capsys.readouterr().err
    for processes in (1, 2):  # one reads on, while the other cuts
        stage("--source", path, "--out", tmp_path / f"p{processes}", "--max-sentences", 1, "--processes", processes)
    assert contents(tmp_path / "p2") == contents(tmp_path / "p1")
    assert open_corpus(tmp_path / "p1").artifact.manifest.counts["dropped_null"] == 1


def test_a_missing_key_is_no_null(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1 has no text"):
        texts(write(tmp_path / "t.jsonl", '{"body": "a"}'), on_null=lambda place: None)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "te\udcfft"
    write(folder / "caf\udce9.txt", "The text of one sentence.")
    stage("--source", folder, "--out", tmp_path / "c")
    corpus = open_corpus(tmp_path / "c")
    assert corpus.document_names([0]) == [r"caf\xe9.txt"]
    assert corpus.artifact.manifest.provenance["source"] == r"te\xfft"
    stage("--source", folder / "caf\udce9.txt", "--out", tmp_path / "d")
    assert open_corpus(tmp_path / "d").document_names([0]) == [r"caf\xe9.txt"]


def test_of_a_folder_what_is_not_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "f"
    write(folder / "rows.json", '[{"text": "j"}]')
    assert texts(folder) == ["j"]
    write(folder / "a.ndjson.gz", gzip.compress(b'{"text": "n"}'))
    write(folder / "b.csv", "text\nc\n")
    write(folder / "page.html", "<p>")
    assert texts(folder) == ["n", "c"]
    assert "2 files are read; left out: 1 of .html, 1 of .json" in caplog.text

"""What is committed under demo/ quotes nobody: it shares no run of 8 words with the texts of others."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts.smollm2_documents import DocumentsConfig, documents, others, runs

ROOT = Path(__file__).parent.parent
CORPORA = ROOT.parent / "shared" / "assets" / "corpora"
COMMONPLACES = (
    "in the first half of the twentieth century",
    "in the second half of the twentieth century",
    "at its height in the early sixteenth century",
    "of the United Nations, the International Court of Justice",
    "the Nobel Prize in Physiology or Medicine in",
    "on the eighth floor of the Asch Building in New York",
    "hydrogen and helium make up most of the",
)
"""Dates, names and facts that are worded alike by whoever writes them; all in passages of the embedded model's corpus."""
TEXT = (".jsonl", ".json", ".md", ".txt", ".py")


def committed_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of what is stored under `folder`, tables and compressed files included."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".gz":
            yield from strings(name, gzip.decompress(path.read_bytes()).decode())
        elif path.suffix == ".parquet":
            for column in ("text", "document"):
                if column in pq.read_schema(path).names:
                    values = pq.read_table(path, columns=[column])[column].unique().to_pylist()
                    yield from ((f"{name}: {column}", text) for text in values)
        elif path.suffix in TEXT:
            yield from strings(name, path.read_text(encoding="utf-8"))


def strings(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Each line of a file; of JSON Lines its strings."""
    for number, line in enumerate(io.StringIO(text), 1):
        if line.startswith("{") and ".jsonl" in name:
            yield from ((f"{name}:{number}", value) for value in leaves(json.loads(line)))
        else:
            yield f"{name}:{number}", line


def leaves(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


def quoted(folder: Path, known: set[int]) -> list[str]:
    return [f"{name}: {text.strip():.80}" for name, text in committed_texts(folder) if not known.isdisjoint(runs(text))]


@pytest.mark.skipif(not CORPORA.is_dir(), reason="the texts of others are not beside the checkout (../shared/assets/corpora)")
def test_nothing_in_demo_is_taken_from_others() -> None:
    known: set[int] = set()
    for document in others(CORPORA):
        known |= runs(document.text)
    assert len(known) > 3_000_000
    for phrase in COMMONPLACES:
        assert runs(phrase) <= known, f"{phrase!r} is in none of them: take it off the list"
        known -= runs(phrase)
    found = quoted(ROOT / "demo", known)
    assert not found, f"{len(found)} texts share a run of 8 words with others', such as {found[:5]}"


def test_every_kind_of_file_is_looked_into(tmp_path: Path) -> None:
    known = runs("It was the best of times, it was the worst of times, it was the age of wisdom")
    quote = "He wrote: it was the WORST of times; it was the age."
    pq.write_table(pa.table({"text": [quote, "nothing"], "latent": [1, 2]}), tmp_path / "a.parquet")
    line = json.dumps({"details": {"words": ["x", quote]}})
    (tmp_path / "b.jsonl").write_text(line + "\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "d.md").write_text("# A title\n" + quote)
    (tmp_path / "e.md").write_text("It was the best of times, and it was also something else.")
    (tmp_path / "f.safetensors").write_bytes(b"\xff\xfe")
    assert [found.split(":")[0] for found in quoted(tmp_path, known)] == ["a.parquet", "b.jsonl", "c.jsonl.gz", "d.md"]


@pytest.mark.skipif(not CORPORA.is_dir(), reason="the texts of others are not beside the checkout (../shared/assets/corpora)")
def test_what_may_be_shown_is_mostly_ours_and_never_known_by_heart(tmp_path: Path) -> None:
    taken = next(iter(others(CORPORA))).text[:600]
    own = [f"Sentence {i} of a text that the model wrote about nothing in particular. " * 8 for i in range(4000)]
    lines = [json.dumps({"text": text, "label": "x"}) for text in [taken, *own]]
    (tmp_path / "written.jsonl").write_text("\n".join(lines) + "\n")
    config = DocumentsConfig(texts=CORPORA, out=tmp_path / "out", written=(tmp_path / "written.jsonl",), shown=True)
    found = documents(config)
    sizes = {source: sum(len(d.text) for d in found if d.source == source) for source in ("passages", "written")}
    assert sizes["passages"] >= 2 * sizes["written"] > 0.9 * sizes["passages"]
    assert not any(document.text == taken for document in found)
    assert {document.source for document in found} == {"passages", "written"}

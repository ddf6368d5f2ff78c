"""Text -> sentences: cut the documents of a source into sentences, or passages, and write them as a corpus folder.

python -m capture.sentences --source books/ --out corpus/
python -m capture.sentences --source nltk:state_union --out corpus/
python -m capture.sentences --source books/ --unit passage --tokens 64 --tokenizer M --out corpus/
python -m capture.sentences --source hf://openwebtext --processes 16 --deduplicate --out corpus/

Sentences keep the order and the text of the source. Ids count documents as they are read and sentences as they are kept.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from capture.cutting import Cutting, Unit, cut
from capture.duplicates import Seen
from capture.listing import source_name, source_version
from capture.punkt import Lines
from capture.sources import Document, open_source
from core.artifact import Builder, building
from core.cli import Progress, StageConfig, machine, run_stage
from core.runtime import Runtime

log = logging.getLogger("capture.sentences")

SENTENCES = pa.schema(
    [
        pa.field("sentence_id", pa.int64(), nullable=False),
        pa.field("document_id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("label", pa.string()),
    ]
)
DOCUMENTS = pa.schema(
    [
        pa.field("document_id", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
DOCUMENT_ROWS = 2**16  # documents held as Python objects before they are packed


@dataclass(frozen=True, kw_only=True)
class SentencesConfig(StageConfig):
    """Flags of the stage."""

    source: str = machine()
    """A text file, a folder of .txt, .jsonl and .parquet files, one such file (.gz and .zst are unpacked), an address of either
    (hf://datasets/OWNER/NAME, s3://..., with * where wanted), hf://openwebtext, hf://sentences (cut already: add --unit
    document), hf://pile, or nltk:NAME. The manifest holds its hash."""
    out: Path
    """The corpus folder to write."""
    encoding: str = "utf-8"
    """Encoding of text and JSON Lines."""
    text_key: str = "text"
    """Where the text stands in JSON Lines (key) and Parquet (column)."""
    lines: Lines = "auto"
    """What one line break means: a sentence's end (paragraphs), a space (wrapped); auto decides per block of lines."""
    punkt: Literal["builtin", "pretrained"] = "builtin"
    """Our own Punkt model for English, the same on every machine, or the one of NLTK's data."""
    language: str = "english"
    """Language of the pretrained model, as NLTK names it."""
    unit: Unit = "sentence"
    """What becomes a row of the corpus: sentences, passages of a fixed number of tokens, or each document as it stands, for a
    source that holds a sentence a row."""
    tokens: int = 64
    """Most tokens of a passage; it ends before the word that would not fit."""
    tokenizer: str = "demo"
    """A model (as in capture.activations --model), whose tokens are counted for passages."""
    min_characters: int = 8
    """Shorter sentences are dropped and counted. 0 or 1 keep all."""
    deduplicate: bool = False
    """Drop, and count, sentences that stood in the corpus before, by a 64-bit hash; eight bytes of memory each."""
    processes: int = machine(1)
    """Processes that cut; the result is the same for any number. Each takes some 2 s to start."""
    sentences_per_file: int = 65_536
    """Rows of each Parquet file but the last."""
    max_sentences: int = 0
    """Stop after this many sentences. 0: no limit."""

    def __post_init__(self) -> None:
        if self.min_characters < 0 or self.max_sentences < 0:
            raise ValueError("--min-characters and --max-sentences must not be negative")
        for name in ("sentences_per_file", "tokens", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")

    def documents(self) -> Iterator[Document]:
        return open_source(self.source, self.encoding, self.text_key)

    @property
    def cutting(self) -> Cutting:
        return Cutting(
            unit=self.unit, punkt=self.punkt, language=self.language, lines=self.lines, tokens=self.tokens,
            tokenizer=self.tokenizer,
        )  # fmt: skip


class CorpusWriter:
    """Gathers sentences and documents, and publishes a Parquet file whenever one is full.

    A file that an earlier run finished is not written again: the same source and flags give the same rows.
    """

    def __init__(self, builder: Builder, sentences_per_file: int) -> None:
        self.names: list[str] = []
        self.sentences = self.documents = 0
        self._builder, self._per_file = builder, sentences_per_file
        self._rows: list[tuple[int, int, str, str | None]] = []
        self._documents: list[tuple[int, str, str]] = []
        self._packed = pa.BufferOutputStream()  # documents.parquet so far, compressed: some ten bytes a document
        self._parquet = pq.ParquetWriter(self._packed, DOCUMENTS, compression="zstd")

    def add_document(self, document: Document) -> int:
        """Returns the document's id."""
        self._documents.append((self.documents, document.name, document.source))
        if len(self._documents) == DOCUMENT_ROWS:
            self._pack_documents()
        self.documents += 1
        return self.documents - 1

    def add_sentence(self, document_id: int, text: str, label: str | None) -> None:
        self._rows.append((self.sentences, document_id, text, label))
        self.sentences += 1
        if len(self._rows) == self._per_file:
            self._publish_sentences()

    def finish(self) -> None:
        """Publish what remains."""
        if self._rows:
            self._publish_sentences()
        self._pack_documents()
        self._parquet.close()
        self._publish("documents.parquet", self._packed.getvalue(), self.documents)

    def _pack_documents(self) -> None:
        self._parquet.write_table(_table(self._documents, DOCUMENTS))
        self._documents = []

    def _publish_sentences(self) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(_table(self._rows, SENTENCES), sink, compression="zstd")
        self._publish(f"sentences-{(self.sentences - 1) // self._per_file:05d}.parquet", sink.getvalue(), len(self._rows))
        self._rows = []

    def _publish(self, name: str, content: pa.Buffer, rows: int) -> None:
        if not self._builder.has(name):
            self._builder.publish(name, content.to_pybytes(), rows)
        self.names.append(name)


def _table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else ([] for _ in schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def source_hash(documents: Iterator[Document]) -> str:
    """Identifies a source by its documents, wherever it lies."""
    digest = xxhash.xxh3_128()
    for document in documents:
        for part in (document.name, document.source, document.text, document.label or ""):
            digest.update(part.encode())
            digest.update(b"\0")
    return digest.hexdigest()[:16]


def run(config: SentencesConfig, runtime: Runtime) -> None:
    """Write the corpus folder; under torchrun, rank 0 does and the others wait."""
    provenance = runtime.on_main(lambda: _identify(config))
    with building(config.out, "corpus", config, runtime, provenance=provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        names, counts = runtime.on_main(lambda: _write(config, builder, runtime))
        builder.finish(names if runtime.is_main else [], counts)
    log.info(
        "%s: %s %ss of %s documents, %s shorter ones and %s duplicates dropped",
        config.out, f"{counts['sentences']:,}", config.unit,
        *(f"{counts[key]:,}" for key in ("documents", "dropped_short", "dropped_duplicate")),
    )  # fmt: skip


def _identify(config: SentencesConfig) -> dict[str, str]:
    """The provenance of the corpus. Reads the whole source, so that bad input is refused before anything is written; of a
    remote source whose store names its content the beginning alone.
    """
    cutter = config.cutting.cutter()
    _refuse_empty(config)
    name = {"sentence": "punkt_hash", "passage": "passages_hash"}.get(config.unit)
    version = source_version(config.source) or source_hash(config.documents())
    return {"source": source_name(config.source), "source_hash": version} | ({name: cutter.hash} if name else {})


def _refuse_empty(config: SentencesConfig) -> None:
    """ValueError where the source yields no sentence."""
    for _, units in cut(config.documents(), config.cutting, processes=1):
        if any(len(unit) >= config.min_characters for unit in units):
            return
    raise ValueError(
        f"--source {config.source}: empty: it holds no {config.unit} of at least {config.min_characters} characters; "
        "give another source or lower --min-characters"
    )


def _write(config: SentencesConfig, builder: Builder, runtime: Runtime) -> tuple[list[str], dict[str, int]]:
    """Cut and write all sentences; returns the names of the files and the counts of the manifest."""
    writer = CorpusWriter(builder, config.sentences_per_file)
    seen = Seen()
    short = duplicate = 0
    limit = config.max_sentences or sys.maxsize
    documents = cut(config.documents(), config.cutting, config.processes)
    with (
        Progress("capture.sentences", config.max_sentences or None, f"{config.unit}s", runtime) as bar,
        closing(documents),
    ):
        for document, units in documents:
            before = writer.sentences
            document_id = writer.add_document(document)
            for unit in units:
                if len(unit) < config.min_characters:
                    short += 1
                elif config.deduplicate and not seen.add(unit):
                    duplicate += 1
                else:
                    writer.add_sentence(document_id, unit, document.label)
                    if writer.sentences == limit:
                        break
            bar.update(writer.sentences - before)
            if writer.sentences == limit:
                break
    writer.finish()
    counts = {"sentences": writer.sentences, "documents": writer.documents}
    return writer.names, counts | {"dropped_short": short, "dropped_duplicate": duplicate}


if __name__ == "__main__":
    run_stage(SentencesConfig, run, __doc__ or "")

"""Where text comes from: documents with a name, a source and perhaps a label, read as a stream.

`open_source` takes a text file, a folder of texts, JSON Lines, Parquet, an address that fsspec knows (`hf://`, `s3://`, `https://`)
or `nltk:NAME`; texts and JSON Lines may be compressed (.gz, .zst). Everything that is not text as announced is refused with the
file and the place in it.
"""

import codecs
import io
import json
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from capture.listing import COMPRESSION, File, is_remote, list_files

PART_CHARACTERS = 2**16
"""A text file longer than this becomes several documents: memory stays flat, and a book can be split into training and
validation documents."""
PART_ENDS = ("\n\n", ".\n", "\n", " ")
"""Where a long text may be cut, the best place first."""
READ_BYTES = 2**20
PARQUET_ROWS = 1024


class Document(NamedTuple):
    """One document, in the order of its source. `label` is a known concept, where the source states one."""

    name: str
    source: str
    text: str
    label: str | None


def open_source(spec: str, encoding: str = "utf-8", text_key: str = "text") -> Iterator[Document]:
    """The documents of `spec`, in the order of the source (folders: by path), read as they are asked for.

    `spec` is a file (.jsonl: keys `text` and optionally `name`, `source`, `label`; .parquet: columns of these names; any other
    suffix: plain text), a folder of .txt, .jsonl and .parquet files, an address of either that fsspec knows (may hold `*`), one
    of PRESETS, or `nltk:NAME` for a plain-text corpus of NLTK's. `text_key` is read in place of `text`.
    Raises ValueError naming file and place where something is missing, not in `encoding`, or not of the announced form.
    """
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(f"--encoding {encoding!r}: no such encoding; expected a name such as utf-8, latin-1, cp1252") from None
    if spec.startswith("nltk:"):
        yield from _read_nltk(spec.removeprefix("nltk:"))
        return
    for file in list_files(spec):
        try:
            yield from _read(file, encoding, text_key)
        except (OSError, ValueError):
            raise
        except Exception as error:
            if not is_remote(spec):
                raise
            # Each of fsspec's backends has errors of its own.
            raise OSError(f"{file.label}: cannot be read: {error}; the same command continues from here") from error


def _read(file: File, encoding: str, text_key: str) -> Iterator[Document]:
    match file.suffixes:
        case (".jsonl", _):
            return _read_jsonl(file, encoding, text_key)
        case (".parquet", _):
            return _read_parquet(file, text_key)
        case _:
            return _read_text(file, encoding)


# --- plain text ---------------------------------------------------------------------------------------------------------------


def _read_text(file: File, encoding: str) -> Iterator[Document]:
    parts = _parts(_characters(file, encoding))
    first, second = next(parts, None), next(parts, None)
    if first is None:
        return
    if second is None:
        yield Document(file.name, file.source, first, None)
        return
    for number, part in enumerate(chain((first, second), parts), 1):
        yield Document(f"{file.name}#{number}", file.source, part, None)


def _characters(source: File, encoding: str) -> Iterator[str]:
    """The file's text in blocks, `\\n` at line ends; ValueError with the byte offset of what is not in `encoding`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0  # bytes given to the decoder, of which it may hold back the beginning of a character
    with _open(source) as file:
        while True:
            held_back = len(decoder.getstate()[0])
            try:
                block = file.read(READ_BYTES)
            except OSError as error:
                raise ValueError(f"{source.label}: cannot be read: {error}") from None
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = position - held_back + error.start
                raise ValueError(
                    f"{source.label}: not {encoding}: {error.reason} at byte {place:,}; give the right one with --encoding, "
                    "such as --encoding latin-1"
                ) from None
            yield newlines.decode(text.removeprefix("\ufeff") if position == 0 else text, final=not block)
            position += len(block)
            if not block:
                return


def _open(file: File) -> Any:
    """The file as bytes, unpacked where its name ends in .gz or .zst."""
    compression = COMPRESSION.get(file.suffixes[1])
    try:
        return pa.input_stream(file.open(), compression=compression) if compression else file.open()
    except OSError as error:
        raise ValueError(f"{file.label}: cannot be read: {error}") from None


def _parts(blocks: Iterator[str]) -> Iterator[str]:
    """The text in parts of at most PART_CHARACTERS, cut at PART_ENDS; parts of white space alone are left out."""
    text = ""
    for block in blocks:
        text += block
        while len(text) > PART_CHARACTERS:
            ends = (text.rfind(end, 1, PART_CHARACTERS) + len(end) for end in PART_ENDS if end in text[1:PART_CHARACTERS])
            cut = next(ends, PART_CHARACTERS)
            if part := text[:cut].strip():
                yield part
            text = text[cut:]
    if part := text.strip():
        yield part


# --- JSON Lines and Parquet ---------------------------------------------------------------------------------------------------


def _read_jsonl(file: File, encoding: str, text_key: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(_characters(file, encoding)), 1):
        if not line.strip():
            continue
        place = f"{file.label}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON ({error}); expected an object a line with a key {text_key!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not an object; expected one object a line with a key {text_key!r}")
        yield _from_row(row, place, f"{file.name}:{number}", file.source, text_key)


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    tail = ""
    for block in blocks:
        *whole, tail = (tail + block).split("\n")
        yield from whole
    yield tail


def _read_parquet(source: File, text_key: str) -> Iterator[Document]:
    with source.open() as opened:
        try:
            file = pq.ParquetFile(opened)
        except (OSError, ValueError) as error:
            raise ValueError(f"{source.label}: not a readable Parquet file: {error}") from None
        columns = file.schema_arrow.names
        if text_key not in columns:
            raise ValueError(f"{source.label}: has no column {text_key!r}; it has {', '.join(columns)}; see --text-key")
        wanted = [column for column in (text_key, "name", "source", "label") if column in columns]
        number = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
            for row in batch.to_pylist():
                yield _from_row(row, f"{source.label}: row {number}", f"{source.name}:{number}", source.source, text_key)
                number += 1


def _from_row(row: dict[str, Any], place: str, name: str, source: str, text_key: str) -> Document:
    text = row.get(text_key)
    if not isinstance(text, str):
        raise ValueError(f"{place} has no text: expected a string under {text_key!r}, found {type(text).__name__}")
    values = {key: str(row[key]) for key in ("name", "source", "label") if row.get(key) is not None}
    document = Document(values.get("name", name), values.get("source", source), text, values.get("label"))
    try:
        "".join((document.text, *values.values())).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no encoding of text can
        raise ValueError(f"{place} holds U+{ord(error.object[error.start]):04X}, half a character; repair the text") from None
    return document


# --- NLTK ---------------------------------------------------------------------------------------------------------------------


def _read_nltk(name: str) -> Iterator[Document]:
    """A plain-text corpus of NLTK's, downloaded where it is not on the machine; a file's only category becomes its label."""
    import nltk.corpus  # here, because it takes a second and most sources need it not
    from nltk.corpus.reader import CategorizedPlaintextCorpusReader, CorpusReader, PlaintextCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    reader = getattr(nltk.corpus, name, None)
    if not isinstance(reader, LazyCorpusLoader | CorpusReader):
        raise ValueError(f"--source nltk:{name}: NLTK knows no corpus of this name; try nltk:state_union or nltk:gutenberg")
    try:
        reader.ensure_loaded()
    except LookupError:
        _download(name)
        reader.ensure_loaded()
    if not isinstance(reader, PlaintextCorpusReader):
        raise ValueError(f"--source nltk:{name}: not a corpus of plain text; try nltk:state_union or nltk:gutenberg")
    for file in reader.fileids():
        labels = list(reader.categories(file)) if isinstance(reader, CategorizedPlaintextCorpusReader) else []
        text = reader.raw(file)
        yield Document(file, f"nltk:{name}", text, labels[0] if len(labels) == 1 else None)


def _download(name: str) -> None:
    """Fetch a package of NLTK's data with its own downloader; ValueError with what to do where that fails."""
    import nltk

    try:
        nltk.download(name, quiet=True, raise_on_error=True, print_error_to=io.StringIO())
        nltk.data.find(f"corpora/{name}")
    except (ValueError, OSError, LookupError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"--source nltk:{name}: the corpus is not on this machine and NLTK's downloader could not fetch it ({reason}); "
            f"with a network, `python -m nltk.downloader {name}`; else copy the package into ~/nltk_data/corpora"
        ) from None

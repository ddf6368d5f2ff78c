"""Where text comes from: documents with a name, a source and perhaps a label, read as a stream.

`open_source` takes a text file, a folder of texts, JSON Lines, JSON, CSV, Parquet, an address that fsspec knows (`hf://`,
`s3://`, `https://`) or `nltk:NAME`; all but Parquet may be compressed (.gz, .zst). Everything that is not text as announced is
refused with the file and the place in it.
"""

import codecs
import io
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

from capture.characters import characters
from capture.listing import File, is_remote, list_files
from capture.rows import Reader, Row, Wanted, read_csv, read_json, read_json_lines, read_parquet
from core.text import MARK

PART_CHARACTERS = 2**16
"""A text file longer than this becomes several documents: memory stays flat, and a book can be split into training and
validation documents."""
PART_ENDS = ("\n\n", ".\n", "\n", " ")
"""Where a long text may be cut, the best place first."""

ROWS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
"""How files of these suffixes are read."""
NOT_TEXT = re.compile(
    r"\.(x?html?|xml|pdf|docx?|odt|rtf|epub|xlsx?|arrow|feather|orc|avro|zip|tar|tgz|bz2|xz|7z|pkl|pickle|pth?|npy|npz|sqlite|db)"
)
"""Suffixes of what is not text as it stands. Every other one is taken for text."""


class Document(NamedTuple):
    """One document, in the order of its source. `label` is a known concept, where the source states one."""

    name: str
    source: str
    text: str
    label: str | None


def refuse_null(place: str) -> None:
    """ValueError for a row without a text."""
    raise ValueError(f"{place} has no text, but a null; --nulls skip leaves such rows out and counts them")


def open_source(
    spec: str, encoding: str = "utf-8", text_key: str = "text", on_null: Callable[[str], None] = refuse_null
) -> Iterator[Document]:
    """The documents of `spec`, in the order of the source (folders: by path), read as they are asked for.

    `spec` is a file (of rows, as in ROWS, with the keys or columns `text` and optionally `name`, `source`, `label`; any other
    suffix: plain text), a folder, an address of either that fsspec knows (may hold `*`), one of PRESETS, or `nltk:NAME` for a
    plain-text corpus of NLTK's. `text_key` is read in place of `text`; a row whose text is null is left out, and `on_null` is
    called with its place.
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
            yield from _read(file, encoding, text_key, on_null)
        except (OSError, ValueError):
            raise
        except Exception as error:
            if not is_remote(spec):
                raise
            # Each of fsspec's backends has errors of its own.
            raise OSError(f"{file.label}: cannot be read: {error}; the same command continues from here") from error


def _read(file: File, encoding: str, text_key: str, on_null: Callable[[str], None]) -> Iterator[Document]:
    suffix = file.suffixes[0]
    if NOT_TEXT.fullmatch(suffix):
        raise ValueError(f"{file.label}: {suffix} is not text as it stands; convert it to .txt or .jsonl first")
    if suffix not in ROWS:
        yield from _read_text(file, encoding)
        return
    others = tuple(key for key in ("name", "source", "label") if key != text_key)
    for row in ROWS[suffix](file, encoding, Wanted(text_key, others)):
        if row.values.get(text_key, "") is None:
            on_null(row.place)
        else:
            yield _from_row(row, file, text_key, others)


# --- plain text ---------------------------------------------------------------------------------------------------------------


def _read_text(file: File, encoding: str) -> Iterator[Document]:
    parts = _parts(characters(file, encoding))
    first, second = next(parts, None), next(parts, None)
    if first is None:
        return
    if second is None:
        yield Document(file.name, file.source, first, None)
        return
    for number, part in enumerate(chain((first, second), parts), 1):
        yield Document(f"{file.name}#{number}", file.source, part, None)


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


# --- rows ---------------------------------------------------------------------------------------------------------------------


def _from_row(row: Row, file: File, text_key: str, others: tuple[str, ...]) -> Document:
    text = row.values.get(text_key)
    if not isinstance(text, str):
        raise ValueError(f"{row.place} has no text: expected a string under {text_key!r}, found {_kind(row, text_key)}")
    values = {key: str(row.values[key]) for key in others if row.values.get(key) is not None}
    name, source = f"{file.name}:{row.number}", file.source
    document = Document(values.get("name", name), values.get("source", source), text, values.get("label"))
    try:
        "".join((document.text, *values.values())).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no encoding of text can
        code = ord(error.object[error.start])
        raise ValueError(f"{row.place} holds U+{code:04X}, half a character; repair the text") from None
    return document


def _kind(row: Row, key: str) -> str:
    return type(row.values[key]).__name__ if key in row.values else f"the keys {', '.join(row.values):.200}"


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
        text = reader.raw(file).removeprefix(MARK)
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

"""Where text comes from: documents with a name, a source and perhaps a label, read as a stream.

`open_source` takes a text file, a folder of texts, JSON Lines, Parquet, or `nltk:NAME`; texts and JSON Lines may be compressed
(.gz, .zst). Everything that is not text as announced is refused with the file and the place in it.
"""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from core.artifact import MANIFEST

PART_CHARACTERS = 2**16
"""A text file longer than this becomes several documents: memory stays flat, and a book can be split into training and
validation documents."""
PART_ENDS = ("\n\n", ".\n", "\n", " ")
"""Where a long text may be cut, the best place first."""
READ_BYTES = 2**20
PARQUET_ROWS = 1024
FOLDER_SUFFIXES = (".txt", ".jsonl", ".parquet")


class Document(NamedTuple):
    """One document, in the order of its source. `label` is a known concept, where the source states one."""

    name: str
    source: str
    text: str
    label: str | None


def open_source(spec: str, encoding: str = "utf-8") -> Iterator[Document]:
    """The documents of `spec`, in the order of the source (folders: by path), read as they are asked for.

    `spec` is a file (.jsonl: keys `text` and optionally `name`, `source`, `label`; .parquet: columns of these names; any other
    suffix: plain text), a folder of .txt, .jsonl and .parquet files, or `nltk:NAME` for a plain-text corpus of NLTK's.
    Raises ValueError naming file and place where something is missing, not in `encoding`, or not of the announced form.
    """
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(f"--encoding {encoding!r}: no such encoding; expected a name such as utf-8, latin-1, cp1252") from None
    if spec.startswith("nltk:"):
        yield from _read_nltk(spec.removeprefix("nltk:"))
        return
    path = Path(spec)
    if path.is_dir():
        for file in _text_files(path):
            yield from _reader(file)(file, file.relative_to(path).as_posix(), path.resolve().name, encoding)
    elif path.is_file():
        yield from _reader(path)(path, path.name, path.name, encoding)
    else:
        raise ValueError(
            f"--source {spec}: no such file or folder; expected a text file, a folder of texts, .jsonl, .parquet or nltk:NAME"
        )


def source_name(spec: str) -> str:
    """How manifests name a source: without the folders above it, which differ between machines."""
    return spec if spec.startswith("nltk:") else Path(spec).resolve().name


Reader = Callable[[Path, str, str, str], Iterator[Document]]  # file, its name, its source, encoding


def _text_files(folder: Path) -> list[Path]:
    """The files to read below `folder`, by path, without hidden ones and without the outputs of stages."""
    if (folder / MANIFEST).is_file():
        raise ValueError(f"--source {folder}: this is the output of a stage; expected a folder of texts")
    outputs = {manifest.parent for manifest in folder.rglob(MANIFEST)}
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file() and _suffix(path) in FOLDER_SUFFIXES),
        key=lambda path: path.relative_to(folder).parts,
    )
    files = [
        path
        for path in files
        if outputs.isdisjoint(path.parents) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(f"--source {folder}: holds no {', '.join(FOLDER_SUFFIXES)} file; expected at least one")
    return files


def _suffix(path: Path) -> str:
    """The suffix that says how to read a file, that of a compression left off."""
    inner = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return inner.suffix.lower()


def _reader(path: Path) -> Reader:
    return {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(_suffix(path), _read_text)


# --- plain text ---------------------------------------------------------------------------------------------------------------


def _read_text(path: Path, name: str, source: str, encoding: str) -> Iterator[Document]:
    parts = _parts(_characters(path, encoding))
    first, second = next(parts, None), next(parts, None)
    if first is None:
        return
    if second is None:
        yield Document(name, source, first, None)
        return
    yield Document(f"{name}#1", source, first, None)
    yield Document(f"{name}#2", source, second, None)
    for number, part in enumerate(parts, 3):
        yield Document(f"{name}#{number}", source, part, None)


def _characters(path: Path, encoding: str) -> Iterator[str]:
    """The file's text in blocks, `\\n` at line ends; ValueError with the byte offset of what is not in `encoding`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0  # bytes given to the decoder, of which it may hold back the beginning of a character
    with _open(path) as file:
        while True:
            held_back = len(decoder.getstate()[0])
            try:
                block = file.read(READ_BYTES)
            except OSError as error:
                raise ValueError(f"{path}: cannot be read: {error}") from None
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = position - held_back + error.start
                raise ValueError(
                    f"{path}: not {encoding}: {error.reason} at byte {place:,}; give the right one with --encoding, "
                    "such as --encoding latin-1"
                ) from None
            yield newlines.decode(text.removeprefix("\ufeff") if position == 0 else text, final=not block)
            position += len(block)
            if not block:
                return


def _open(path: Path) -> Any:
    """The file as bytes, unpacked where its name ends in .gz or .zst."""
    try:
        return pa.input_stream(path, compression="detect") if path.suffix.lower() in (".gz", ".zst") else path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


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


def _read_jsonl(path: Path, name: str, source: str, encoding: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(_characters(path, encoding)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number} is not JSON ({error}); expected an object a line with a key 'text'"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is not an object; expected one object a line with a key 'text'")
        yield _from_row(row, f"{path}: line {number}", f"{name}:{number}", source)


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    tail = ""
    for block in blocks:
        *whole, tail = (tail + block).split("\n")
        yield from whole
    yield tail


def _read_parquet(path: Path, name: str, source: str, encoding: str) -> Iterator[Document]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None
    columns = file.schema_arrow.names
    if "text" not in columns:
        raise ValueError(f"{path}: has no column 'text'; it has {', '.join(columns)}")
    wanted = [column for column in ("text", "name", "source", "label") if column in columns]
    number = 0
    for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
        for row in batch.to_pylist():
            yield _from_row(row, f"{path}: row {number}", f"{name}:{number}", source)
            number += 1


def _from_row(row: dict[str, Any], place: str, name: str, source: str) -> Document:
    text = row.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{place} has no text: expected a string under 'text', found {type(text).__name__}")
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

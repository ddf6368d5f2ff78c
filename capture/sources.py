"""Where text comes from: documents with a name, a source and perhaps a label, read as a stream.

`open_source` takes a text file, a folder of texts, JSON Lines, Parquet, an address that fsspec knows (`hf://`, `s3://`, `https://`)
or `nltk:NAME`; texts and JSON Lines may be compressed (.gz, .zst). Everything that is not text as announced is refused with the
file and the place in it.
"""

import codecs
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from core.artifact import MANIFEST

PART_CHARACTERS = 2**16
"""A text file longer than this becomes several documents: memory stays flat, and a book can be split into training and
validation documents."""
PART_ENDS = ("\n\n", ".\n", "\n", " ")
"""Where a long text may be cut, the best place first."""
READ_BYTES = 2**20
PARQUET_ROWS = 1024
FOLDER_SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
PRESETS = {
    "hf://openwebtext": "hf://datasets/Skylion007/openwebtext@refs/convert/parquet/**/*.parquet",
    "hf://sentences": "hf://datasets/PaulPauls/openwebtext-sentences/**/*.parquet",
    "hf://pile": "hf://datasets/monology/pile-uncopyrighted/train/*.jsonl.zst",
}
"""Short names: OpenWebText, the sentences that the reference run published, and the Pile without what was withdrawn from it."""


class Document(NamedTuple):
    """One document, in the order of its source. `label` is a known concept, where the source states one."""

    name: str
    source: str
    text: str
    label: str | None


class File(NamedTuple):
    """One file of a source."""

    label: str
    """How messages call it: path or address."""
    name: str
    """Below the source."""
    source: str
    open: Callable[[], BinaryIO]
    """Its bytes, as they are stored."""
    version: str | None
    """What a remote store says identifies the content; None for a file that must be read to tell."""

    @property
    def suffixes(self) -> tuple[str, str]:
        """The suffix that says how to read it, and that of a compression, or nothing."""
        path = PurePosixPath(self.name.lower())
        return (PurePosixPath(path.stem).suffix, path.suffix) if path.suffix in COMPRESSION else (path.suffix, "")


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
    for file in _files(spec):
        match file.suffixes:
            case (".jsonl", _):
                yield from _read_jsonl(file, encoding, text_key)
            case (".parquet", _):
                yield from _read_parquet(file, text_key)
            case _:
                yield from _read_text(file, encoding)


def source_name(spec: str) -> str:
    """How manifests name a source: without the folders above it, which differ between machines."""
    return spec if spec.startswith("nltk:") or _is_remote(spec) else Path(spec).resolve().name


def source_version(spec: str) -> str | None:
    """What identifies a remote source by its listing, so that it need not be fetched twice; None where it must be read."""
    if not _is_remote(spec):
        return None
    files = _files(spec)
    if any(file.version is None for file in files):
        return None
    return xxhash.xxh3_128_hexdigest("\n".join(f"{file.name} {file.version}" for file in files).encode())[:16]


def _is_remote(spec: str) -> bool:
    return "://" in spec


def _files(spec: str) -> list[File]:
    if _is_remote(spec):
        return _remote_files(spec)
    path = Path(spec)
    if path.is_dir():
        source = path.resolve().name
        below = [(file, file.relative_to(path).as_posix()) for file in _text_files(path)]
        return [File(str(file), name, source, partial(_bytes, file), None) for file, name in below]
    if path.is_file():
        return [File(spec, path.name, path.name, partial(_bytes, path), None)]
    raise ValueError(
        f"--source {spec}: no such file or folder; expected a text file, a folder of texts, .jsonl, .parquet, nltk:NAME, "
        f"an address such as hf://datasets/OWNER/NAME, or {', '.join(PRESETS)}"
    )


def _bytes(path: Path) -> BinaryIO:
    return path.open("rb")


def _text_files(folder: Path) -> list[Path]:
    """The files to read below `folder`, by path, without hidden ones and without the outputs of stages."""
    if (folder / MANIFEST).is_file():
        raise ValueError(f"--source {folder}: this is the output of a stage; expected a folder of texts")
    outputs = {manifest.parent for manifest in folder.rglob(MANIFEST)}
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file() and _is_text(path.name)),
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


def _is_text(name: str) -> bool:
    """Whether a folder's file of this name is read."""
    path = PurePosixPath(name.lower())
    return (PurePosixPath(path.stem).suffix if path.suffix in COMPRESSION else path.suffix) in FOLDER_SUFFIXES


def _remote_files(spec: str) -> list[File]:
    """The files at an address, in order of path; their bytes are fetched as they are read."""
    address = PRESETS.get(spec, spec)
    try:
        system, path = fsspec.core.url_to_fs(address)
        found = (system.glob if "*" in path else system.find)(path, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"--source {spec}: cannot be listed: {' '.join(str(error).split())[:200]}") from None
    infos = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
    if len(infos) != 1 or "*" in path:
        infos = {name: info for name, info in infos.items() if _is_text(name)}
    if not infos:
        raise ValueError(f"--source {spec}: holds no {', '.join(FOLDER_SUFFIXES)} file; expected at least one")
    root = posixpath.commonpath([posixpath.dirname(name) for name in infos])
    return [
        File(
            system.unstrip_protocol(name),
            name.removeprefix(root).lstrip("/"),
            spec,
            partial(system.open, name, "rb"),
            _version(info),
        )
        for name, info in infos.items()
    ]


def _version(info: dict[str, Any]) -> str | None:
    """Size and content hash of a remote file, under the names that the Hub and S3 give the latter."""
    content = info.get("blob_id") or info.get("ETag")
    return None if content is None else f"{info['size']} {content}"


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

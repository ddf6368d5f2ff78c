"""The characters of a file, unpacked and decoded block by block, so that memory stays flat."""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa

from capture.listing import File
from core.text import MARK

READ_BYTES = 2**20
MAX_LINE = 2**27
"""Characters of a line, or of one object or field: what is longer is no document, and would fill the memory."""
BINARY = {
    b"%PDF": "a PDF document",
    b"PK\3\4": "a ZIP archive, as .docx, .odt, .xlsx and .epub are too",
    b"\x1f\x8b": "packed by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ": "packed by xz",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"{\\rtf": "an RTF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
"""How files begin that are not text."""


@contextmanager
def _opened(file: File) -> Iterator[Any]:
    """The file as bytes, unpacked where its name ends in .gz or .zst."""
    with ExitStack() as held:
        try:
            opened: Any = held.enter_context(file.open())
            match file.suffixes[1]:
                case ".gz":  # Python's reader, because zeros behind the last member are padding to it
                    opened = held.enter_context(gzip.GzipFile(fileobj=opened))
                case ".zst":
                    opened = held.enter_context(pa.input_stream(opened, compression="zstd"))
        except OSError as error:
            raise ValueError(f"{file.label}: cannot be read: {error}") from None
        yield opened


def characters(source: File, encoding: str) -> Iterator[str]:
    """The file's text in blocks, `\\n` at line ends; ValueError with the byte offset of what is not in `encoding`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0  # bytes given to the decoder, of which it may hold back the beginning of a character
    with _opened(source) as file:
        while True:
            held_back = len(decoder.getstate()[0])
            try:
                block = file.read(READ_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{source.label}: cannot be read: {error}") from None
            if position == 0:
                _refuse_binary(source, block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = position - held_back + error.start
                raise ValueError(
                    f"{source.label}: not {encoding}: {error.reason} at byte {place:,}; give the right one with --encoding, "
                    "such as --encoding latin-1"
                ) from None
            yield newlines.decode(text.removeprefix(MARK) if position == 0 else text, final=not block)
            position += len(block)
            if not block:
                return


def _refuse_binary(source: File, block: bytes) -> None:
    found = next((what for magic, what in BINARY.items() if block.startswith(magic)), None)
    if found:
        raise ValueError(f"{source.label}: is {found}, not text; unpack it or convert it to text first")


def lines_of(blocks: Iterator[str], label: str) -> Iterator[str]:
    """The lines of the text, without their ends. ValueError for one of more than MAX_LINE characters."""
    begun: list[str] = []  # of a line whose end has not come yet
    size, number = 0, 1
    for block in blocks:
        first, *others = block.split("\n")
        begun.append(first)
        size += len(first)
        if size > MAX_LINE:
            raise ValueError(f"{label}: line {number} is longer than {MAX_LINE:,} characters; cut it into lines first")
        if others:
            yield "".join(begun)
            yield from others[:-1]
            number += len(others)
            begun, size = [others[-1]], len(others[-1])
    yield "".join(begun)

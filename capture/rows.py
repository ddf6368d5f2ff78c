"""Files of rows: JSON Lines, JSON arrays, CSV and Parquet, as dicts that are read one at a time.

An error names the file and the row.
"""

import csv
import json
import re
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from capture import characters
from capture.characters import lines_of
from capture.listing import File
from core.text import parse_json

PARQUET_ROWS = 1024
PARQUET_BYTES = 2**26  # of a batch of rows, as far as its file says how long they are
SPACE = re.compile(r"\s*")


class Row(NamedTuple):
    """One row of a file."""

    place: str
    """How messages call it."""
    number: int
    values: dict[str, Any]


class Wanted(NamedTuple):
    """What is read of each row."""

    text: str
    """The key of the text, which there must be."""
    others: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.text, *self.others)


Reader = Callable[[File, str, Wanted], Iterator[Row]]


# --- JSON ---------------------------------------------------------------------------------------------------------------------


def read_json_lines(file: File, encoding: str, wanted: Wanted) -> Iterator[Row]:
    """An object a line."""
    return _json_lines(file, characters.characters(file, encoding), wanted)


def read_json(file: File, encoding: str, wanted: Wanted) -> Iterator[Row]:
    """An array of objects, or an object a line."""
    blocks = characters.characters(file, encoding)
    begun: list[str] = []
    for block in blocks:
        begun.append(block)
        if first := block.lstrip():
            return (_json_array if first[0] == "[" else _json_lines)(file, chain(begun, blocks), wanted)
    return iter(())


def _json_lines(file: File, blocks: Iterator[str], wanted: Wanted) -> Iterator[Row]:
    for number, line in enumerate(lines_of(blocks, file.label), 1):
        if not line.strip():
            continue
        place = f"{file.label}: line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON ({error}); expected an object a line with a key {wanted.text!r}") from None
        if isinstance(row, dict) and any(line.count(f'"{key}"') > 1 for key in wanted.keys):
            _refuse_twice(place, _top_keys(line), wanted)
        yield _object(place, number, row, wanted)


def _top_keys(line: str) -> list[str]:
    """The keys of the object, each as often as it stands there. Of an object, the last pairs are those of the outermost."""
    found: list[list[tuple[str, Any]]] = []
    json.loads(line, object_pairs_hook=lambda pairs: found.append(pairs))
    return [key for key, _ in found[-1]]


def _refuse_twice(place: str, names: list[str], wanted: Wanted) -> None:
    if twice := next((key for key in wanted.keys if names.count(key) > 1), None):
        raise ValueError(f"{place} has {twice!r} twice; rename one of them, or name another with --text-key")


def _object(place: str, number: int, row: Any, wanted: Wanted) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not an object; expected one with a key {wanted.text!r}")
    return Row(place, number, row)


def _json_array(file: File, blocks: Iterator[str], wanted: Wanted) -> Iterator[Row]:
    window = _Window(blocks, file.label)
    window.take("[")
    number = 0
    if window.peek() == "]":
        window.take("]")
    else:
        while True:
            number += 1
            place = f"{file.label}: item {number}"
            yield _object(place, number, window.value(place), wanted)
            if window.take(",", "]") == "]":
                break
    if rest := window.peek():
        raise ValueError(f"{file.label}: {rest!r} stands behind the array; expected one array, or an object a line")


class _Window:
    """The part of a JSON text that is being parsed."""

    def __init__(self, blocks: Iterator[str], label: str) -> None:
        self._blocks, self._label = filter(None, blocks), label
        self._text, self._at = "", 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._read(1):
                return self._text[self._at : self._at + 1]

    def take(self, *expected: str) -> str:
        if (found := self.peek()) not in expected:
            what = repr(found) if found else "its end"
            raise ValueError(f"{self._label}: not JSON: expected {' or '.join(expected)} of the array, found {what}")
        self._at += 1
        return found

    def value(self, place: str) -> Any:
        """The value that begins here. What looks broken may be cut off, so more is read, twice as much each time."""
        self.peek()
        n = 1
        while True:
            try:
                found, self._at = self._decoder.raw_decode(self._text, self._at)
                return found
            except RecursionError:
                raise ValueError(f"{place} is nested too deeply") from None
            except ValueError as error:
                if not self._read(n):
                    raise ValueError(f"{place} is not JSON ({error})") from None
                if len(self._text) > characters.MAX_LINE:
                    raise ValueError(f"{place} is longer than {characters.MAX_LINE:,} characters, or not JSON") from None
                n *= 2

    def _read(self, n_blocks: int) -> bool:
        """Read on, and forget what was parsed; False at the end of the text."""
        read = "".join(islice(self._blocks, n_blocks))
        self._text, self._at = self._text[self._at :] + read, 0
        return bool(read)


# --- CSV ----------------------------------------------------------------------------------------------------------------------


def read_csv(file: File, encoding: str, wanted: Wanted) -> Iterator[Row]:
    """A row a record, below a line with the names of the columns; .tsv has tabs between them, .csv commas."""
    csv.field_size_limit(characters.MAX_LINE)
    lines = (f"{line}\n" for line in lines_of(characters.characters(file, encoding), file.label))
    reader = csv.reader(lines, delimiter="\t" if file.suffixes[0] == ".tsv" else ",", strict=True)
    names: list[str] = []
    number = 0
    while True:
        place = f"{file.label}: line {reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{place} is not CSV ({error}); is a quotation mark missing?") from None
        if values is None:
            return
        if not values:
            continue
        if not names:
            names = values
            _refuse_missing(file.label, names, wanted)
            continue
        if len(values) != len(names):
            raise ValueError(f"{place} has {len(values)} fields, the first line names {len(names)} columns")
        number += 1
        yield Row(place, number, dict(zip(names, values, strict=True)))


def _refuse_missing(label: str, columns: list[str], wanted: Wanted) -> None:
    if wanted.text not in columns:
        raise ValueError(f"{label}: has no column {wanted.text!r}; it has {', '.join(columns):.300}; see --text-key")
    _refuse_twice(label, columns, wanted)


# --- Parquet ------------------------------------------------------------------------------------------------------------------


def read_parquet(source: File, encoding: str, wanted: Wanted) -> Iterator[Row]:
    """A row a row, numbered from 0."""
    with source.open() as opened:
        try:
            file = pq.ParquetFile(opened)
            schema = file.schema_arrow
            texts = [item.name for item in schema if item.name in wanted.keys and _is_text(item.type)]
            file = pq.ParquetFile(opened, metadata=file.metadata, read_dictionary=texts)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{source.label}: not a readable Parquet file: {error}") from None
        _refuse_missing(source.label, schema.names, wanted)
        names = [name for name in wanted.keys if name in schema.names]
        number = 0
        batches = file.iter_batches(_rows_at_once(file), columns=names)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ValueError(f"{source.label}: cannot be read from row {number:,} on: {error}") from None
            if batch is None:
                return
            rows = [_values(batch.column(name), name, source.label, number) for name in names]
            for values in zip(*rows, strict=True):
                yield Row(f"{source.label}: row {number}", number, dict(zip(names, values, strict=True)))
                number += 1


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _rows_at_once(file: Any) -> int:
    """Rows of a batch: fewer where they are long."""
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    longest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES // max(longest, 1)))


def _values(column: Any, name: str, label: str, first: int) -> Iterator[Any]:
    """The values of a column, made one at a time: a text that all rows share is in memory once, as it is in the file."""
    shared = isinstance(column, pa.DictionaryArray)
    places: Collection[int | None] = column.indices.to_pylist() if shared else range(len(column))
    values = column.dictionary if shared else column
    for row, place in enumerate(places, first):
        try:
            yield None if place is None else values[place].as_py()
        except UnicodeDecodeError as error:
            raise ValueError(f"{label}: row {row}: {name!r} is not UTF-8 ({error.reason} at byte {error.start:,})") from None

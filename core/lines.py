"""JSON Lines that grow while a stage runs, with a checksum in every line: journals, saved replies, `metrics.jsonl`.

    {"step": 10, "loss": 0.25, "xxh3": "5d9bd1e24e1f0d0a"}

`xxh3` is the xxh3-64 of the line as it would be without it, so that any JSON reader still reads the lines. A process may die
while it writes the last line: that one alone may be cut short, and is left out. Any other damage is refused.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from core import files

KEY = "xxh3"
_FORM = b', "xxh3": "................"}'
_BLANK = b"." * 16
_SEAL = re.compile(_FORM.replace(_BLANK, b"[0-9a-f]{16}"))

log = logging.getLogger("core.lines")


class Lines(NamedTuple):
    """What a file of checksummed lines holds."""

    records: list[dict[str, Any]]
    """One a line, without its checksum."""
    bytes: int
    """Where the last whole line ends."""
    torn: int
    """Bytes behind it: a line that was being written when the process died."""
    unchecked: bool = False
    """Whether the file is of a release that wrote no checksums."""


def sealed(record: Mapping[str, Any]) -> bytes:
    """The line of `record`, with its checksum and its line break."""
    assert record, "a line says something"
    assert KEY not in record
    return _with_seal(json.dumps(record).encode()) + b"\n"


def _with_seal(text: bytes) -> bytes:
    return text[:-1] + _FORM.replace(_BLANK, xxhash.xxh3_64_hexdigest(text).encode())


def read_lines(path: Path, advice: str) -> Lines:
    """The lines of a file; none where it does not exist.

    Files of earlier releases have no checksums; of those, lines that a crash cut short are left out wherever they stand.

    Raises ValueError naming file and line where one is damaged, with `advice`, which says what to do.
    """
    data = path.read_bytes() if path.exists() else b""
    *whole, tail = data.split(b"\n")
    unchecked = bool(whole) and not any(_bears_seal(line) for line in [*whole, tail])
    if tail and (_SEAL.search(tail) or (unchecked and _is_object(tail))):
        whole, tail = [*whole, tail], b""  # all but its line break; in one cut short, no checksum has anything behind it
    elif tail and tail[:1] not in b"{\0":  # what was not written of a line is nothing, or zeros after a power cut
        whole, tail = [*whole, tail], b""
    records = []
    for number, line in enumerate(whole, 1):
        record = _parsed(line) if unchecked else _unsealed(line)
        if record is not None and KEY not in record:
            records.append(record)
        elif not unchecked or not line.startswith(b"{") or line.endswith(b"}"):
            why = "is no JSON object" if unchecked else "does not fit its checksum"
            raise ValueError(f"{path}: line {number} {why}: the file is damaged; {advice}")
    return Lines(records, len(data) - len(tail), len(tail), unchecked)


def _bears_seal(line: bytes) -> bool:
    """Whether a line was written with a checksum, be there one damaged byte in its name or its brackets."""
    end = line[-len(_FORM) :]
    fixed = [(a, b) for a, b in zip(end, _FORM, strict=False) if b != ord(".")]
    return bool(_SEAL.search(line)) or (len(end) == len(_FORM) and sum(a != b for a, b in fixed) <= 1)


def _unsealed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where its checksum does not fit."""
    text = line[: -len(_FORM)] + b"}"
    record = _parsed(text)
    return record if record and _with_seal(text) == line else None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_object(text: bytes) -> bool:
    return _parsed(text) is not None


class LineWriter:
    """Appends to a file of checksummed lines, of which it is the only writer; each line is on disk when `write` returns."""

    def __init__(self, path: Path, advice: str) -> None:
        """`path` need not exist. A file without checksums is written anew with them.

        Raises ValueError where a line is damaged, with `advice`.
        """
        found = read_lines(path, advice)
        if found.unchecked:
            log.warning("%s: its lines have no checksums yet; they are taken as they are, and get them now", path)
            text = b"".join(map(sealed, found.records))
            files.replace(path, text)
            found = Lines(found.records, len(text), 0)
        self.path = path
        self.records = found.records
        """What the file held when it was opened."""
        self._end, self._torn = found.bytes, found.torn
        if path.exists():
            files.sync_folder(path.parent)  # who made it may have been killed before

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line.

        Raises ValueError where somebody else writes to the file too, such as a job on another machine that no lock keeps out.
        """
        line = sealed(record)
        self._end, self._torn = files.append(self.path, line, self._end, self._torn), 0

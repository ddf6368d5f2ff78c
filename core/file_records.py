"""What is noted of each file of an artifact: in its manifest, and while it is built in the journal of its rank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from core import files
from core.lines import read_lines

JOURNAL_ADVICE = "remove it and give the same command again: the files that it lists are then made again"


class FileRecord(NamedTuple):
    """One file of an artifact: path inside the folder, size, xxh3-128, and rows where it holds rows."""

    name: str
    bytes: int
    checksum: str
    rows: int


def remove_journals(path: Path) -> None:
    for journal in path.glob(".journal-*.jsonl"):
        files.remove(journal)


def read_journals(path: Path) -> list[FileRecord]:
    """What earlier runs finished, whatever their number of ranks; where records differ, the one that fits the file, if any.

    Raises ValueError where a journal is damaged. Records of one without checksums count where they fit their file.
    """
    records: dict[str, set[FileRecord]] = {}
    doubtful: set[str] = set()
    for journal in sorted(path.glob(".journal-*.jsonl")):
        lines = read_lines(journal, JOURNAL_ADVICE)
        for number, line in enumerate(lines.records, 1):
            record = _record(line)
            if record is None:
                raise ValueError(f"{journal}: line {number} is no record of a file; {JOURNAL_ADVICE}")
            records.setdefault(record.name, set()).add(record)
            if lines.unchecked:
                doubtful.add(record.name)
    settled = [
        one
        for name, rivals in records.items()
        for one in rivals
        if (len(rivals) == 1 and name not in doubtful) or _fits(path, one)
    ]
    return [record for record in settled if record.bytes >= 0]


def _record(line: Mapping[str, Any]) -> FileRecord | None:
    kinds = {"name": str, "bytes": int, "checksum": str, "rows": int}
    if line.keys() != kinds.keys() or not all(isinstance(line[name], kind) for name, kind in kinds.items()):
        return None
    return FileRecord(**line)


def _fits(folder: Path, record: FileRecord) -> bool:
    path = folder / record.name
    return path.is_file() and files.checksum(path) == (record.bytes, record.checksum)

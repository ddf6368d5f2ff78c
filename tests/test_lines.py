"""core/lines.py: no damaged line is taken for a line, and of a dying process's last line nothing but that line is lost."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from core import files
from core.lines import LineWriter, read_lines, sealed
from tests.faults import ForkServer, fail_at

ADVICE = "put it back"
RECORDS: list[dict[str, Any]] = [{"a": 1}, {"text": 'a "quoted" J*J\u2028 line', "n": None}, {"deep": {"b": [1.5, True]}}]


def written(path: Path, records: list[dict[str, Any]] = RECORDS) -> bytes:
    path.unlink(missing_ok=True)
    lines = LineWriter(path, ADVICE)
    for record in records:
        lines.write(record)
    return path.read_bytes()


def flips(data: bytes) -> list[bytes]:
    return [data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in range(len(data)) for bit in range(8)]


def test_any_json_reader_reads_the_lines(tmp_path: Path) -> None:
    data = written(tmp_path / "lines")
    assert data == b"".join(map(sealed, RECORDS))
    found = [json.loads(line) for line in data.splitlines()]
    assert [{name: line[name] for name in line if name != "xxh3"} for line in found] == RECORDS
    assert read_lines(tmp_path / "lines", ADVICE) == (RECORDS, len(data), 0, False)
    assert read_lines(tmp_path / "none", ADVICE) == ([], 0, 0, False)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_single_bit_is_refused_naming_file_and_line(memory_path: Path, n: int) -> None:
    path = memory_path / "lines"
    for data in flips(written(path, RECORDS[:n])):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"/lines: line \d does not fit its checksum.*; put it back$") as refused:
            read_lines(path, ADVICE)
        assert "\n" not in str(refused.value)


def test_a_file_cut_at_any_byte_lacks_its_last_line_at_most(memory_path: Path) -> None:
    path = memory_path / "lines"
    data = written(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        whole = data[: length + 1].count(b"\n")  # a line is whole without its line break too
        assert read_lines(path, ADVICE).records == RECORDS[:whole]
        LineWriter(path, ADVICE).write({"new": length})
        assert read_lines(path, ADVICE).records == [*RECORDS[:whole], {"new": length}]


def test_a_bit_of_a_file_with_a_torn_line_alters_nothing_else(memory_path: Path) -> None:
    path = memory_path / "lines"
    whole = written(path)
    torn = whole + sealed({"event": "torn, it is"})[:-9]
    harmless = 0
    for number, data in enumerate(flips(torn)):
        path.write_bytes(data)
        try:
            assert read_lines(path, ADVICE).records == RECORDS
        except ValueError as error:
            assert "/lines: line " in str(error)  # noqa: PT017
        else:
            harmless += 1
            assert number >= 8 * len(whole)
    assert harmless


def test_zeros_behind_a_power_cut_are_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(written(path) + b"\0" * 100)
    assert read_lines(path, ADVICE).records == RECORDS


def test_lines_that_vanish_into_one_another_are_refused(tmp_path: Path) -> None:
    """Random ranges are removed, doubled and swapped: what is read is made of lines that were written, or refused."""
    path = tmp_path / "lines"
    data, draw, refused = written(path), random.Random(1), 0
    for _ in range(300):
        first, second = sorted(draw.sample(range(len(data)), 2))
        harmed = draw.choice([data[:first] + data[second:], data[:second] + data[first:], data[second:] + data[:second]])
        path.write_bytes(harmed)
        if b'"xxh3"' not in harmed:  # then it reads as a file of an earlier release
            continue
        try:
            assert all(record in RECORDS for record in read_lines(path, ADVICE).records)
        except ValueError:
            refused += 1
    assert refused > 200


def test_a_file_of_an_earlier_release_opens_and_gets_checksums(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines"
    old = [json.dumps(record) for record in RECORDS]
    path.write_text("\n".join([old[0], '{"cut sho', *old[1:], '{"cut']))  # a torn line was closed before the next
    assert read_lines(path, ADVICE).unchecked
    caplog.set_level(logging.WARNING)
    lines = LineWriter(path, ADVICE)
    assert "no checksums yet" in caplog.text
    lines.write({"new": 1})
    assert path.read_bytes() == b"".join(map(sealed, [*RECORDS, {"new": 1}]))


@pytest.mark.parametrize("line", ["[1]", "{}}", "\ufffd"])
def test_what_no_release_wrote_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="lines: line 2 is no JSON object"):
        read_lines(path, ADVICE)


def test_a_second_writer_is_noticed_before_and_after(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    first, second = LineWriter(path, ADVICE), LineWriter(path, ADVICE)
    first.write({"by": 1})
    with pytest.raises(ValueError, match="lines: another process writes to this file"):
        second.write({"by": 2})
    assert read_lines(path, ADVICE).records == [{"by": 1}]
    third = LineWriter(path, ADVICE)

    def meanwhile(operation: str, where: Path) -> None:
        if operation == "fsync":
            files.before_operation = fail_at(0)
            path.write_bytes(path.read_bytes().replace(b'"by": 3', b'"by": 4'))  # as long, as on NFS

    files.before_operation = meanwhile
    with pytest.raises(ValueError, match="lines: another process writes to this file"):
        third.write({"by": 3})


def test_an_error_at_every_operation_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    for n in range(1, 10):
        path = tmp_path / str(n)
        path.write_bytes(sealed({"old": 1}) + b'{"torn')
        lines = LineWriter(path, ADVICE)
        seen: list[str] = []
        files.before_operation = fail_at(n, seen)
        try:
            lines.write({"new": 1})
        except OSError as error:
            assert "injected" in str(error)  # noqa: PT017
        files.before_operation = fail_at(0)
        done = len(seen) < n
        assert read_lines(path, ADVICE).records == [{"old": 1}, {"new": 1}][: 1 + done]
        lines.write({"new": 2})
        assert read_lines(path, ADVICE).records == [{"old": 1}, *([{"new": 1}] if done else []), {"new": 2}]
        if done:
            break
    assert seen == ["open", "truncate", "write", "fsync"]
    seen.clear()
    files.before_operation = fail_at(0, seen)
    written(tmp_path / "fresh", RECORDS[:1])
    assert seen == ["open", "write", "fsync", "fsync_folder"], "a new file outlives a power cut only with its name"


def write_one(path: str) -> None:
    LineWriter(Path(path), ADVICE).write({"new": 1})


def test_a_kill_at_every_operation_leaves_what_can_be_read(tmp_path: Path, fork_server: ForkServer) -> None:
    for n in range(1, 10):
        path = tmp_path / str(n)
        path.write_bytes(sealed({"old": 1}) + b'{"torn')
        status = fork_server.run(write_one, path, exit_at=n)
        assert read_lines(path, ADVICE).records[0] == {"old": 1}
        write_one(str(path))
        if status == 0:
            break
    assert n == 6  # open, truncate, write, fsync, and the folder, whose names an earlier process may have left unsynced

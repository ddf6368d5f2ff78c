"""core/artifact.py: whatever fails, a folder reads as the old whole state or the new one, and the same command completes it."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core import files
from core.artifact import (
    MANIFEST,
    UNLISTED,
    Builder,
    FileRecord,
    Manifest,
    building,
    check_provenance,
    config_record,
    open_artifact,
    verify,
)
from core.cli import StageConfig
from core.lines import read_lines, sealed
from core.runtime import Runtime, Solo
from tests.faults import ForkServer, fail_at

ALONE = Runtime(0, 1, torch.device("cpu"), Solo())


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    out: Path = Path("out")
    width: int = 3
    names: tuple[str, ...] = ("a", "b")


CONTENT = {"one.bin": b"1" * 3000, "deep/er/two.bin": bytes(range(256)) * 40, "three.bin": b"three"}


def build(out: str | Path, config: Config | None = None, kind: str = "things") -> bool:
    """A small stage: two files, a scratch file, one published twice. True where an earlier run had finished it."""
    config = config or Config()
    with building(Path(out), kind, config, ALONE, provenance={"model_hash": "m1"}) as builder:
        if builder.complete:
            return True
        builder.publish("scratch.bin", b"scratch")
        for name, content in CONTENT.items():
            if not builder.has(name):
                builder.publish(name, [content[:7], content[7:]], rows=len(content))
        builder.publish("three.bin", b"third", rows=5)
        builder.forget("scratch.bin")
        builder.finish(list(CONTENT), {"rows": 7}, {"site": "embed"})
    return False


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("clean") / "out"
    assert build(folder) is False
    return snapshot(folder)


def check_state(folder: Path, clean: dict[str, bytes]) -> bool:
    """A reader sees either the whole artifact (True) or a refusal (False); and no file is half under its final name."""
    for name, content in (snapshot(folder) if folder.exists() else {}).items():
        if not Path(name).name.startswith(".") and name != MANIFEST:
            assert content in (*CONTENT.values(), b"third", b"scratch")
    try:
        verify(folder)
    except ValueError:
        return False
    assert {name: c for name, c in snapshot(folder).items() if not name.startswith(".")} == clean
    return True


def operations(folder: Path) -> list[str]:
    """The names of all file operations of a build from nothing."""
    seen: list[str] = []
    files.before_operation = fail_at(0, seen)
    build(folder)
    files.before_operation = fail_at(0)
    return seen


def test_a_finished_folder_that_records_less_is_left_alone(tmp_path: Path) -> None:
    """As an earlier version leaves it; a half-finished one is not continued, and another value is refused in any case."""
    for name in ("done", "half"):
        with building(tmp_path / name, "things", Config(), ALONE, provenance={"model_hash": "m1"}) as builder:
            builder.publish("one.bin", b"1")
            if name == "done":
                builder.finish(["one.bin"], {})
    now = {"model_hash": "m1", "batch_tokens": 64}
    with building(tmp_path / "done", "things", Config(), ALONE, provenance=now) as builder:
        assert builder.complete
    with (
        pytest.raises(ValueError, match="batch_tokens None"),
        building(tmp_path / "half", "things", Config(), ALONE, provenance=now),
    ):
        pass
    with (
        pytest.raises(ValueError, match="model_hash 'm1'"),
        building(tmp_path / "done", "things", Config(), ALONE, provenance=now | {"model_hash": "m2"}),
    ):
        pass


@dataclass(frozen=True, kw_only=True)
class Later(Config):
    """The flags of a later version: two more, and another default."""

    width: int = 5
    shade: str = "red"
    tones: tuple[int, ...] = (1, 2)


@pytest.mark.parametrize("finished", [False, True])
def test_a_flag_that_an_earlier_version_did_not_have_counts_as_its_default(tmp_path: Path, finished: bool) -> None:
    (build if finished else half_build)(tmp_path)
    before = snapshot(tmp_path)
    for config, message in (
        (Later(width=3, shade="blue"), "made with --shade red, now blue is asked for"),
        (Later(width=3, tones=()), r"made with --tones 1 2, now \(none\) is asked for"),
        (Later(names=("a",)), r"made with --names a b, now a; --width 3, now 5 \(the default\) is asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, config)
        assert snapshot(tmp_path) == before
    assert build(tmp_path, Later(width=3)) is finished


def started(folder: Path, config: Config, how: str = "error") -> None:
    """A start that ends before any file is written."""
    with (
        suppress(ValueError, KeyboardInterrupt, SystemExit),
        building(folder, "things", config, ALONE, provenance={"model_hash": "m1"}) as builder,
    ):
        if how == "claim":
            builder.claim()
        if how != "return":
            raise {"error": ValueError, "claim": ValueError, "interrupt": KeyboardInterrupt, "exit": SystemExit}[how]("no key")


@pytest.mark.parametrize("how", ["error", "interrupt", "exit", "return"])
def test_a_start_that_fails_claims_nothing(tmp_path: Path, how: str) -> None:
    started(tmp_path / "new" / "out", Config(), how)
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    started(tmp_path / "out", Config(), how)
    assert os.listdir(tmp_path / "out") == []
    (tmp_path / "out" / "thesis.txt").write_text("three years")
    started(tmp_path / "out", Config(), how)
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def killed_start(out: str) -> None:
    with building(Path(out), "things", Config(), ALONE, provenance={"model_hash": "m1"}):
        os._exit(9)


def test_a_start_that_was_killed_before_its_first_file_claims_nothing(tmp_path: Path, fork_server: ForkServer) -> None:
    assert fork_server.run(killed_start, tmp_path) == 9
    assert Manifest.read(tmp_path).complete is False
    build(tmp_path, Config(width=4), kind="others")
    assert verify(tmp_path).config["width"] == 4


def test_a_claimed_folder_stays_with_its_command(tmp_path: Path) -> None:
    started(tmp_path, Config(), "claim")
    for _ in range(2):
        with pytest.raises(ValueError, match="was made with --width 3, now 4 is asked for"):
            build(tmp_path, Config(width=4))
        started(tmp_path, Config(), "claim")
    assert (tmp_path / ".journal-0.jsonl").read_bytes().count(b"\n") == 1
    build(tmp_path)
    assert set(snapshot(tmp_path)) == {*CONTENT, MANIFEST}


def test_what_a_build_leaves(tmp_path: Path, clean: dict[str, bytes]) -> None:
    assert set(clean) == {*CONTENT, MANIFEST}
    manifest = json.loads(clean[MANIFEST])
    assert manifest["config"] == {"threads": 0, "seed": 0, "width": 3, "names": ["a", "b"]}
    assert manifest["counts"] == {"rows": 7}
    assert manifest["provenance"] == {"model_hash": "m1", "package_version": "0.1.0", "site": "embed"}
    assert [record["name"] for record in manifest["files"]] == sorted(CONTENT)
    build(tmp_path / "out")
    artifact = open_artifact(tmp_path / "out", "other", "things")
    assert artifact.names == sorted(CONTENT)
    assert artifact.rows("one.bin") == 3000
    assert artifact.file("deep/er/two.bin").read_bytes() == CONTENT["deep/er/two.bin"]
    assert artifact.as_input() == {"kind": "things", "hash": artifact.manifest.hash}


def test_every_file_passes_the_one_place_and_the_manifest_comes_first_and_last(tmp_path: Path) -> None:
    renamed: list[str] = []

    def note(operation: str, path: Path) -> None:
        if operation == "rename":
            renamed.append(path.relative_to(tmp_path).as_posix())

    files.before_operation = note
    build(tmp_path)
    assert renamed == [MANIFEST, "scratch.bin", "one.bin", "deep/er/two.bin", "three.bin", "three.bin", MANIFEST]


@pytest.mark.parametrize("for_good", [False, True])
def test_an_error_at_every_operation(memory_path: Path, clean: dict[str, bytes], for_good: bool) -> None:
    total = len(operations(memory_path / "count"))
    assert total > 40
    outcomes = []
    for n in range(1, total + 1):
        folder = memory_path / f"out{n}"
        files.before_operation = fail_at(n, for_good=for_good)
        with pytest.raises(OSError, match="injected"):
            build(folder)
        files.before_operation = fail_at(0)
        outcomes.append(check_state(folder, clean))
        build(folder)
        assert snapshot(folder) == clean
        shutil.rmtree(folder)
    assert outcomes == sorted(outcomes), "once complete, complete"
    assert outcomes[0] is False
    assert outcomes[-1] is True


def test_a_kill_at_every_operation(memory_path: Path, clean: dict[str, bytes], fork_server: ForkServer) -> None:
    total, outcomes = len(operations(memory_path / "count")), []
    for n in range(1, total + 2):
        folder = memory_path / f"out{n}"
        status = fork_server.run(build, folder, exit_at=n)
        assert status == (9 if n <= total else 0)
        outcomes.append(check_state(folder, clean))
        assert build(folder) is outcomes[-1]
        assert snapshot(folder) == clean
        shutil.rmtree(folder)
    assert outcomes == sorted(outcomes)


def slow_build(out: str) -> None:
    """A build that waits before each operation, some 100 ms in all, so that a kill by the clock hits any part of it."""
    files.before_operation = lambda operation, path: time.sleep(0.0015)
    build(out)


def test_kill_9_by_the_clock(memory_path: Path, clean: dict[str, bytes], fork_server: ForkServer) -> None:
    killed = 0
    for i in range(20):
        folder = memory_path / str(i)
        killed += fork_server.run(slow_build, folder, kill_after=0.002 + 0.006 * i) == -9
        check_state(folder, clean)
        build(folder)
        assert snapshot(folder) == clean
    assert killed >= 5


def test_a_kill_twice_in_a_row(memory_path: Path, clean: dict[str, bytes], fork_server: ForkServer) -> None:
    """The second run dies too, at another place: journals of several runs add up, and temporaries do not."""
    for first in range(5, 40, 7):
        for second in range(3, 30, 5):
            folder = memory_path / f"{first}-{second}"
            assert fork_server.run(build, folder, exit_at=first) == 9
            fork_server.run(build, folder, exit_at=second)
            build(folder)
            assert snapshot(folder) == clean
            shutil.rmtree(folder)


def test_finished_files_are_not_written_again(tmp_path: Path, fork_server: ForkServer) -> None:
    seen = operations(tmp_path / "count")
    last_rename = max(i for i, name in enumerate(seen[:-12]) if name == "rename") + 1
    fork_server.run(build, tmp_path / "out", exit_at=last_rename)
    before = (tmp_path / "out" / "one.bin").stat().st_mtime_ns
    build(tmp_path / "out")
    assert (tmp_path / "out" / "one.bin").stat().st_mtime_ns == before


def damage(kind: str) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    if kind == "cut":
        yield "to nothing", lambda data: b""
        yield "to one byte", lambda data: data[:1]
        yield "in half", lambda data: data[: len(data) // 2]
        yield "by one byte", lambda data: data[:-1]
    else:
        for part in (0.0, 0.13, 0.5, 0.77, 0.999):
            for bit in (0, 3, 7):
                yield f"bit {bit} at {part}", lambda data, part=part, bit=bit: flipped(data, int(part * len(data)), bit)


def flipped(data: bytes, index: int, bit: int) -> bytes:
    return data[:index] + bytes([data[index] ^ (1 << bit)]) + data[index + 1 :]


@pytest.mark.parametrize("kind", ["cut", "flip"])
@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_damage_is_refused_naming_the_file(tmp_path: Path, name: str, kind: str) -> None:
    build(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for how, harm in damage(kind):
        (tmp_path / name).write_bytes(harm(whole))
        with pytest.raises(ValueError, match=f"{name}.*(damaged|bytes)") as caught:
            verify(tmp_path)
        assert "\n" not in str(caught.value), how
    (tmp_path / name).write_bytes(whole)
    verify(tmp_path)


def test_every_single_bit_of_the_manifest_counts(memory_path: Path) -> None:
    build(memory_path)
    whole = (memory_path / MANIFEST).read_bytes()
    for index in range(len(whole)):
        (memory_path / MANIFEST).write_bytes(flipped(whole, index, index % 8))
        with pytest.raises(ValueError, match=MANIFEST):
            Manifest.read(memory_path)


def test_a_file_damaged_after_opening_is_refused_when_read(tmp_path: Path) -> None:
    build(tmp_path)
    artifact = open_artifact(tmp_path)
    (tmp_path / "one.bin").write_bytes(b"2" * 3000)
    with pytest.raises(ValueError, match=r"one\.bin: damaged: expected 3,000 bytes with checksum"):
        artifact.file("one.bin")
    with pytest.raises(ValueError, match="holds no file 'four'"):
        artifact.file("four")


def other_version(folder: Path) -> None:
    text = (folder / MANIFEST).read_text().replace('"format_version": 1', '"format_version": 2, "new": 0')
    (folder / MANIFEST).write_text(text)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "one.bin").unlink(), r"1 file\(s\) missing, the first is one.bin"),
        (lambda folder: (folder / "deep" / "x").write_text(""), r"1 file\(s\) not listed in the manifest, the first is deep/x"),
        (lambda folder: (folder / MANIFEST).unlink(), "holds no manifest.json"),
        (shutil.rmtree, "no such folder"),
        (other_version, "format version 2, expected 1"),
    ],
)
def test_missing_and_extra_things_are_named(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    build(tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        open_artifact(tmp_path / "out")


@pytest.mark.parametrize("name", UNLISTED)
def test_what_a_person_may_read_lies_beside_the_files_unhashed(name: str, tmp_path: Path) -> None:
    build(tmp_path / "out")
    before = Manifest.read(tmp_path / "out").hash
    for text in ("a model card", "another"):
        (tmp_path / "out" / name).write_text(text)
        assert verify(tmp_path / "out").hash == before
    build(tmp_path / "out")  # done already: nothing happens
    (tmp_path / "out" / "deep").mkdir(exist_ok=True)
    (tmp_path / "out" / "deep" / name).touch()
    with pytest.raises(ValueError, match=f"not listed in the manifest, the first is deep/{name}"):
        open_artifact(tmp_path / "out")


def test_a_folder_above_the_one_that_was_meant_names_it(tmp_path: Path) -> None:
    build(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no manifest.json.*give one of the folders in it: out"):
        open_artifact(tmp_path)


def test_another_kind_and_an_unfinished_folder_are_refused(tmp_path: Path, fork_server: ForkServer) -> None:
    build(tmp_path / "a")
    with pytest.raises(ValueError, match="expected a folder of kind corpus or sae, found things"):
        open_artifact(tmp_path / "a", "corpus", "sae")
    fork_server.run(build, tmp_path / "b", exit_at=30)
    with pytest.raises(ValueError, match="has not finished; give its command again"):
        open_artifact(tmp_path / "b")


def half_build(out: str) -> None:
    with building(Path(out), "things", Config(), ALONE, provenance={"model_hash": "m1"}) as builder:
        builder.publish("one.bin", CONTENT["one.bin"], rows=3000)


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_another_command_is_refused_and_not_harmed(tmp_path: Path, finished: bool) -> None:
    folder = tmp_path / "out"
    (build if finished else half_build)(folder)
    before = snapshot(folder)
    with pytest.raises(ValueError, match="was made with --width 3, now 4 is asked for"):
        build(folder, Config(width=4))
    with pytest.raises(ValueError, match=r"was made with --names a b, now \(none\) is asked for"):
        build(folder, Config(names=()))
    with pytest.raises(ValueError, match="already holds things; choose another --out for corpus"):
        build(folder, kind="corpus")
    with (
        pytest.raises(ValueError, match="was begun with model_hash 'm1', now it is 'm2'"),
        building(folder, "things", Config(), ALONE, provenance={"model_hash": "m2"}),
    ):
        pass
    build(tmp_path / "input", Config(width=9))
    with pytest.raises(ValueError, match="was made from other inputs"):
        building(folder, "things", Config(), ALONE, [open_artifact(tmp_path / "input")], {"model_hash": "m1"}).__enter__()
    assert snapshot(folder) == before
    assert build(folder, Config(device="cpu", timeout_s=1.0, out=Path("/elsewhere"))) is finished


def test_a_folder_of_the_user_is_refused_and_not_harmed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    (tmp_path / ".notes.tmp").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty \(it holds thesis\.txt\) and not the output of a stage"):
        build(tmp_path)
    assert snapshot(tmp_path) == {"thesis.txt": b"three years", ".notes.tmp": b"mine"}


def test_manifests_name_no_place_time_host_or_process(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Everything(Config):
        corpus: Path | None = None
        extra: tuple[Path, ...] = ()
        model: str = "demo"
        sources: tuple[str, ...] = ()
        inner: Config = field(default_factory=Config)

    places = {
        "corpus": tmp_path,
        "extra": (tmp_path,),
        "model": str(tmp_path / "llama"),
        "sources": (f"{tmp_path}/t", "./u", "v/w"),
    }
    record = config_record(Everything(**places))
    assert record == {
        "threads": 0, "seed": 0, "width": 3, "names": ["a", "b"], "model": "llama", "sources": ["t", "u", "v/w"],
        "inner": {"threads": 0, "seed": 0, "width": 3, "names": ["a", "b"]},
    }  # fmt: skip
    assert config_record(Everything(corpus=None)).keys() == record.keys()
    build(tmp_path / "out")
    text = (tmp_path / "out" / MANIFEST).read_text()
    for word in (str(tmp_path), socket.gethostname(), "time", "date", "rank", "world", "device", "pid"):
        assert word not in text


class FakeRanks:
    """A group of two whose other rank's answers are given; enough to see what rank 0 writes for any number of ranks."""

    def __init__(self, others: list[FileRecord]) -> None:
        self.others = others

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.others] if isinstance(value, list) else [value, (None, None)]


def test_the_number_of_ranks_leaves_no_trace(tmp_path: Path, clean: dict[str, bytes]) -> None:
    """A run of two ranks is killed and continued by one: journals of both count, and the bytes are those of a run alone."""
    folder = tmp_path / "out"
    half_build(str(folder))
    second = Builder(folder, Manifest("things", {}), replace(ALONE, rank=1, world_size=2))
    second.publish("deep/er/two.bin", CONTENT["deep/er/two.bin"], rows=10240)
    assert sorted(p.name for p in folder.glob(".journal*")) == [".journal-0.jsonl", ".journal-1.jsonl"]
    third = FileRecord("three.bin", *files.publish(folder / "three.bin", b"third"), 5)
    two_ranks = Runtime(0, 2, torch.device("cpu"), FakeRanks([third]))  # type: ignore[arg-type]
    with building(folder, "things", Config(), two_ranks, provenance={"model_hash": "m1"}) as builder:
        assert builder.has("one.bin")
        assert builder.has("deep/er/two.bin")
        assert builder.has("three.bin") is None
        builder.finish(["one.bin", "deep/er/two.bin"], {"rows": 7}, {"site": "embed"})
    assert snapshot(folder) == clean


def test_rival_records_of_one_file_are_settled_by_its_content(tmp_path: Path) -> None:
    """Rank 1 wrote a file in one run, rank 0 replaced it by one of the same size in the next, and was killed."""
    half_build(str(tmp_path))
    Builder(tmp_path, Manifest("things", {}), replace(ALONE, rank=1, world_size=2)).publish("x", b"old")
    Builder(tmp_path, Manifest("things", {}), ALONE).publish("x", b"new")
    with building(tmp_path, "things", Config(), ALONE, provenance={"model_hash": "m1"}) as builder:
        record = builder.has("x")
        assert record == FileRecord("x", *files.checksum(tmp_path / "x"), 0)
        files.publish(tmp_path / "x", b"neu")  # the process dies before the journal learns of it
    with building(tmp_path, "things", Config(), ALONE, provenance={"model_hash": "m1"}) as builder:
        assert builder.has("x") is None


def republish(out: str) -> None:
    with building(Path(out), "things", Config(), ALONE, provenance={"model_hash": "m1"}) as builder:
        builder.publish("one.bin", b"2" * 3000, rows=3000)


def test_a_kill_while_a_file_is_replaced_leaves_no_record_of_the_old_one(tmp_path: Path, fork_server: ForkServer) -> None:
    """New content of the old size: only the journal can tell which of the two lies there."""
    for n in range(1, 30):
        folder = tmp_path / str(n)
        half_build(str(folder))
        status = fork_server.run(republish, folder, exit_at=n)
        with building(folder, "things", Config(), ALONE, provenance={"model_hash": "m1"}) as builder:
            record = builder.has("one.bin")
            assert record is None or record[1:3] == files.checksum(folder / "one.bin")
        if status == 0:
            break
    assert n > 15


def test_a_torn_last_line_of_a_journal_is_cut_off(tmp_path: Path, clean: dict[str, bytes]) -> None:
    half_build(str(tmp_path))
    with (tmp_path / ".journal-0.jsonl").open("ab") as journal:
        journal.write(b'{"name": "three.bin", "byt')
    build(tmp_path)
    assert snapshot(tmp_path) == clean


def test_no_single_bit_of_a_journal_alters_an_artifact(memory_path: Path, clean: dict[str, bytes]) -> None:
    """Each is refused by name, and without the journal the same command makes the same bytes."""
    half_build(str(memory_path))
    journal = memory_path / ".journal-0.jsonl"
    whole = journal.read_bytes()
    before = snapshot(memory_path)
    for place in range(8 * len(whole)):
        journal.write_bytes(flipped(whole, place // 8, place % 8))
        with pytest.raises(ValueError, match=r"journal-0\.jsonl: line 1 .*remove it") as refused:
            build(memory_path)
        assert "\n" not in str(refused.value)
    journal.unlink()
    assert snapshot(memory_path) == {name: content for name, content in before.items() if name != journal.name}
    build(memory_path)
    assert snapshot(memory_path) == clean


@pytest.mark.parametrize("line", [{"name": "x"}, {"name": ["x"], "bytes": 1, "checksum": "", "rows": 0}])
def test_a_line_that_is_no_record_is_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    half_build(str(tmp_path))
    with (tmp_path / ".journal-0.jsonl").open("ab") as journal:
        journal.write(sealed(line))
    with pytest.raises(ValueError, match=r"journal-0\.jsonl: line 2 is no record"):
        build(tmp_path)


def test_a_journal_without_checksums_counts_where_it_fits_its_files(tmp_path: Path, clean: dict[str, bytes]) -> None:
    """Of an earlier release; what was altered in it, or belongs to a file that was, is made again."""
    half_build(str(tmp_path))
    journal = tmp_path / ".journal-0.jsonl"
    record = read_lines(journal, "").records[0]
    for old in (record, record | {"checksum": "0" * 32}, record | {"rows": 1}):
        journal.write_text(json.dumps(old) + "\n")
        with building(tmp_path, "things", Config(), ALONE, provenance={"model_hash": "m1"}) as builder:
            assert bool(builder.has("one.bin")) is (old["checksum"] == record["checksum"])
    journal.write_text(json.dumps(record) + "\n")
    build(tmp_path)
    assert snapshot(tmp_path) == clean


def test_a_finished_file_that_was_altered_is_not_read(tmp_path: Path) -> None:
    with building(tmp_path, "things", Config(), ALONE) as builder:
        builder.publish("one.bin", b"12345")
        assert builder.read("one.bin") == b"12345"
        (tmp_path / "one.bin").write_bytes(b"12845")
        with pytest.raises(ValueError, match=r"one\.bin: damaged: .*remove it"):
            builder.read("one.bin")


def test_check_provenance_names_both_values() -> None:
    check_provenance("the SAE", {"site": "embed", "d_model": 3}, {"site": "embed", "d_model": 4}, ["site"])
    with pytest.raises(ValueError, match="the SAE: d_model is 4, but 3 is needed"):
        check_provenance("the SAE", {"site": "embed", "d_model": 3}, {"site": "embed", "d_model": 4}, ["site", "d_model"])


@pytest.mark.parametrize("link", [False, True])
def test_an_output_is_apart_from_every_other(tmp_path: Path, link: bool) -> None:
    """A file of another stage in a folder makes it unreadable, whether it is an input or not."""
    build(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    given = tmp_path / "link"
    if link:
        given.symlink_to(tmp_path / "a")
        before.append(given)
    else:
        given = tmp_path / "a"
    for out in (given / "sae", given / "deep" / "er"):
        with pytest.raises(ValueError, match=r"lies in .*the output of a stage"):
            build(out)
    source = open_artifact(tmp_path / "a")
    with (
        pytest.raises(ValueError, match="is one of the inputs"),
        building(given, "numbers", Config(out=given), ALONE, [source]),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == sorted(before)
    verify(tmp_path / "a")


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for out in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(ValueError, match=r"link: is a link to .*gone, where nothing is"):
            build(out)
    assert not (tmp_path / "gone").exists()

"""Capture under faults: kills, damage, full disks, two jobs in one folder; then the same bytes and nothing left behind."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture import plan
from capture.store import open_activations, open_corpus
from core import files
from core.files import locked
from tests.conftest import ROOT, Launch
from tests.faults import ForkServer, fail_at
from tests.test_capture import FLAGS, SITES, capture, command, contents, write_corpus
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `corpus` and `clean`, an uninterrupted run."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_llama(folder / "model")
    write_corpus(folder)
    capture(folder / "model", folder / "corpus", folder / "clean")
    return folder


def resume(tiny: Path, out: Path) -> None:
    """The same command again, then the bytes of the uninterrupted run."""
    capture(tiny / "model", tiny / "corpus", out)
    assert contents(out) == contents(tiny / "clean")


def n_operations(tiny: Path, out: Path) -> int:
    operations: list[str] = []
    files.before_operation = fail_at(0, operations)
    capture(tiny / "model", tiny / "corpus", out)
    return len(operations)


def test_killed_at_some_file_operations(tiny: Path, memory_path: Path, fork_server: ForkServer) -> None:
    last = n_operations(tiny, memory_path / "whole")
    for n in random.Random(0).sample(range(1, last + 1), 4):
        out = memory_path / f"at{n}"
        assert fork_server.run(capture, tiny / "model", tiny / "corpus", out, exit_at=n) == 9
        resume(tiny, out)


@pytest.mark.faults
def test_killed_at_every_file_operation(tiny: Path, memory_path: Path, fork_server: ForkServer) -> None:
    for n in range(1, n_operations(tiny, memory_path / "whole") + 1):
        out = memory_path / f"at{n}"
        assert fork_server.run(capture, tiny / "model", tiny / "corpus", out, exit_at=n) == 9
        resume(tiny, out)
        shutil.rmtree(out)


@pytest.mark.faults
def test_killed_at_fifty_moments(tiny: Path, memory_path: Path, fork_server: ForkServer) -> None:
    for attempt in range(2):  # the second is timed: the first pays for what is loaded late
        began = time.monotonic()
        assert fork_server.run(capture, tiny / "model", tiny / "corpus", memory_path / f"whole{attempt}") == 0
    whole = time.monotonic() - began
    chance = random.Random(0)
    statuses: list[int] = []
    while statuses.count(-9) < 50:
        out = memory_path / f"moment{len(statuses)}"
        moment = chance.uniform(0, whole)
        statuses.append(fork_server.run(capture, tiny / "model", tiny / "corpus", out, kill_after=moment))
        resume(tiny, out)
        shutil.rmtree(out)
        assert len(statuses) < 250, "the runs end before they are killed"


def test_two_ranks_then_one_then_three(tiny: Path, tmp_path: Path, fork_server: ForkServer, launch: Launch) -> None:
    """Two ranks that are killed, one that is killed, and three to the end."""
    out = tmp_path / "acts"
    flags = ("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", out, *FLAGS, "--timeout-s", 20)
    lost = launch("-m", "tests.capture_ranks", 30, *flags, ranks=2, limit=400)
    assert lost.returncode != 0
    first = n_chunks(out)
    assert fork_server.run(capture, tiny / "model", tiny / "corpus", out, exit_at=40) == 9
    second = n_chunks(out)
    assert 0 < first < second < n_chunks(tiny / "clean")
    done = launch("-m", "capture.activations", *flags, ranks=3, limit=400)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tiny / "clean")


def n_chunks(folder: Path) -> int:
    return len(list(folder.rglob("*.safetensors")))


# --- damage ----------------------------------------------------------------------------------------------------------------


def test_two_hundred_damaged_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    """100 flipped bits and 100 cuts over chunks, sentences, documents and manifests: each is refused by the file's name."""
    chance = random.Random(0)
    targets = {folder: [p for p in sorted((tiny / folder).rglob("*")) if p.is_file()] for folder in ("clean", "corpus")}
    for n in range(200):
        folder = chance.choice(["clean", "corpus"])
        original = chance.choice(targets[folder])
        copy = tmp_path / f"{folder}{n}"
        shutil.copytree(tiny / folder, copy)
        damaged = copy / original.relative_to(tiny / folder)
        content = bytearray(original.read_bytes())
        if n % 2:
            damaged.write_bytes(content[: chance.randrange(len(content))])
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            damaged.write_bytes(content)
        with pytest.raises(ValueError, match=damaged.name):
            read_everything(copy, folder)
        shutil.rmtree(copy)


def read_everything(path: Path, folder: str) -> None:
    if folder == "corpus":
        corpus = open_corpus(path)
        corpus.texts(range(corpus.n_sentences))
        corpus.document_names([0])
    else:
        for site in SITES:
            store = open_activations(path, site)
            for index in range(len(store)):
                store.chunk(index)


# --- disks and rivals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up(
    tiny: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before it starts; and where the room is gone only later, stopped with path, needed and free bytes."""
    ballast = small_disk / "ballast"
    out = small_disk / "acts"
    arguments = ("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", out, *FLAGS)
    ballast.write_bytes(bytes(900 * 1024))
    with pytest.raises(SystemExit):
        command(*arguments)
    assert re.search(r"--out \S+: about 0.\d+ MB are needed .* and 0.\d+ MB are free", capsys.readouterr().err)
    assert not out.exists()
    monkeypatch.setattr(plan, "free", lambda path: 10**9)
    began = time.monotonic()
    with pytest.raises(SystemExit) as exit_:
        command(*arguments)
    assert exit_.value.code == 2
    assert time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert "disk full: writing " in said
    assert re.search(r"needs at least [\d,]+ bytes, [\d,]+ are free there", said)
    assert str(out) in said
    earlier = {name: content for name, content in contents(out).items() if name.endswith(".safetensors")}
    clean = contents(tiny / "clean")
    assert earlier
    assert all(clean[name] == content for name, content in earlier.items())
    ballast.unlink()
    command(*arguments)
    assert contents(out) == clean


def test_the_second_job_in_a_folder_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "acts"), pytest.raises(SystemExit):
        command("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", tmp_path / "acts", *FLAGS)
    assert f"another job is writing here (host {os.uname().nodename}, process {os.getpid()})" in capsys.readouterr().err


def test_a_killed_job_leaves_no_process_and_no_shared_memory(tiny: Path, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    flags = ("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", tmp_path / "acts", *FLAGS)
    job = subprocess.Popen(
        [sys.executable, "-m", "capture.activations", *map(str, flags)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while job.poll() is None and not list((tmp_path / "acts").rglob("*.safetensors")):
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not group_members(job.pid)
    assert (set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()) <= before
    resume(tiny, tmp_path / "acts")


def group_members(group: int) -> list[int]:
    """Processes of a process group that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found

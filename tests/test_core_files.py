"""core/files.py: a file is whole or absent, whatever fails; the lock is held by one job and never stale."""

import errno
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from core import files
from tests.faults import ForkServer, fail_at

ROOT = Path(__file__).parent.parent

OLD, NEW = b"old content\n" * 40, [b"new ", b"content\n" * 100_000, b"", b"end"]


def temporaries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob(".*.tmp"))


def test_publish_returns_size_and_checksum_of_what_lies_there(tmp_path: Path) -> None:
    written = files.publish(tmp_path / "a", NEW)
    content = b"".join(NEW)
    assert (tmp_path / "a").read_bytes() == content
    assert written == (len(content), xxhash.xxh3_128_hexdigest(content)) == files.checksum(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert files.publish(tmp_path / "empty", b"") == files.checksum(tmp_path / "empty")


def test_operations_come_in_the_order_that_survives_a_power_cut(tmp_path: Path) -> None:
    seen: list[str] = []
    files.before_operation = fail_at(0, seen)
    files.publish(tmp_path / "a", [b"1", b"2"])
    assert seen == ["open", "write", "write", "flush", "fsync", "rename", "fsync_folder"]
    seen.clear()
    files.make_folder(tmp_path / "b" / "c")
    assert seen == ["mkdir", "fsync_folder", "mkdir", "fsync_folder"]
    files.make_folder(tmp_path / "b" / "c")
    assert len(seen) == 4


@pytest.mark.parametrize("for_good", [False, True])
def test_publish_with_an_error_at_every_operation_leaves_the_old_or_the_new(tmp_path: Path, for_good: bool) -> None:
    target, new = tmp_path / "a", b"".join(NEW)
    for n in range(1, 100):
        target.write_bytes(OLD)
        seen: list[str] = []
        files.before_operation = fail_at(n, seen, for_good)
        failure = ""
        try:
            files.publish(target, NEW)
        except OSError as error:
            failure = str(error)
        if not failure:
            break
        assert "injected" in failure
        assert str(tmp_path) in failure
        renamed = "rename" in seen[: n - 1]
        assert target.read_bytes() == (new if renamed else OLD)
        assert len(temporaries(tmp_path)) == (for_good and not renamed and n > 1)
        files.before_operation = fail_at(0)
        files.sweep(tmp_path)
    assert n == 10, "open, four writes, flush, fsync, rename, fsync_folder"


def test_publish_cleans_up_after_any_error_of_its_content(tmp_path: Path) -> None:
    def content() -> Iterator[bytes]:
        yield b"begun"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.publish(tmp_path / "a", content())
    assert os.listdir(tmp_path) == []


def publish_new(path: str) -> None:
    files.publish(Path(path), NEW)


def test_publish_is_cut_by_a_kill_at_every_operation(tmp_path: Path, fork_server: ForkServer) -> None:
    target, new = tmp_path / "a", b"".join(NEW)
    for n in range(1, 100):
        target.write_bytes(OLD)
        status = fork_server.run(publish_new, target, exit_at=n)
        assert target.read_bytes() == (OLD if n <= 8 else new)
        if status == 0:
            break
        assert status == 9
    assert n == 10
    assert len(temporaries(tmp_path)) == 7, "each kill between open and rename leaves one"
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


def publish_too_much(path: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # Python ignores SIGXFSZ, so that writes fail with EFBIG
    with pytest.raises(OSError, match=rf"file too large: {path} needs at least [\d,]+ bytes, .*ulimit -f") as caught:
        files.publish(Path(path), [b"x" * 5_000] * 5)
    assert caught.value.errno == errno.EFBIG


def test_a_file_size_limit_is_named_and_the_old_file_stays(tmp_path: Path, fork_server: ForkServer) -> None:
    (tmp_path / "a").write_bytes(OLD)
    assert fork_server.run(publish_too_much, tmp_path / "a") == 0
    assert (tmp_path / "a").read_bytes() == OLD
    assert temporaries(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no `mount` on this machine")
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs needs root here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_names_needed_and_free_bytes_and_what_was_there_stays(small_disk: Path) -> None:
    files.publish(small_disk / "first", b"1" * 100_000)
    with pytest.raises(OSError, match=r"disk full: writing .*/second needs at least 200,000 bytes, [\d,]+ are free") as caught:
        files.publish(small_disk / "second", [b"2" * 100_000] * 3)
    assert caught.value.errno == errno.ENOSPC
    assert "free some space" in str(caught.value)
    assert os.listdir(small_disk) == ["first"], "the half file gives its room back"
    assert (small_disk / "first").read_bytes() == b"1" * 100_000
    files.publish(small_disk / "second", b"2" * 100_000)


def test_a_file_in_the_way_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="a file lies where a folder is needed"):
        files.make_folder(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="a file lies where a folder is needed"), files.locked(tmp_path / "a"):
        pass


HOLD = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from core.files import locked
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
""")


def test_second_job_is_refused_naming_the_first_and_a_dead_ones_lock_is_free(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"another job is writing here .host {os.uname().nodename}, process {holder.pid}."):
            files.locked(folder).__enter__()
    finally:
        holder.kill()
        holder.communicate()
    assert (folder / ".lock").exists()
    with files.locked(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()
    assert os.listdir(folder) == []


CONTEND = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from core.files import locked
    folder, alone = Path(sys.argv[1]), Path(sys.argv[1] + ".alone")
    wins, deadline = 0, time.monotonic() + 30
    while wins < 15:
        assert time.monotonic() < deadline
        try:
            with locked(folder):
                os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
                alone.unlink()
            wins += 1
        except ValueError:
            time.sleep(0.001)
""")


def test_lock_is_one_job_at_a_time_however_they_race(tmp_path: Path) -> None:
    """Six processes take and leave one lock in a loop, each making sure that it is alone while it holds it."""
    command = [sys.executable, "-c", CONTEND, str(tmp_path / "out")]
    contenders = [subprocess.Popen(command, cwd=ROOT) for _ in range(6)]
    assert [contender.wait(60) for contender in contenders] == [0] * 6


def test_lock_is_not_taken_on_a_file_that_its_holder_has_just_removed(tmp_path: Path) -> None:
    """The holder leaves between our open and our lock: what we then hold has no name, and would keep nobody out."""
    seen: list[str] = []

    def holder_leaves(operation: str, path: Path) -> None:
        seen.append(operation)
        if operation == "lock" and seen.count("lock") == 1:
            path.unlink()

    files.before_operation = holder_leaves
    with files.locked(tmp_path):
        assert seen.count("lock") == 2
        with pytest.raises(ValueError, match="another job is writing here"):
            files.locked(tmp_path).__enter__()


def test_lock_survives_a_folder_that_is_removed_under_it(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with files.locked(folder):
        (folder / ".lock").unlink()
        with files.locked(folder):
            pass
        assert not (folder / ".lock").exists()


def test_lock_of_a_file_system_without_locks_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with pytest.raises(OSError, match="this file system cannot lock files"), files.locked(tmp_path):
        pass


def test_kill_9_at_random_moments_never_shows_half_a_file(tmp_path: Path) -> None:
    """The child publishes over and over; each time a different length of one byte, so that a mixture would be seen."""
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from core import files
        for i in range(10**6):
            files.publish(Path(sys.argv[1]), [bytes([i % 7]) * 1000] * (100 + i % 7))
    """)
    target = tmp_path / "a"
    for delay in (0.0, 0.003, 0.011, 0.023, 0.041):
        child = subprocess.Popen([sys.executable, "-c", code, str(target)], cwd=ROOT)
        deadline = time.monotonic() + 20
        while not (target.exists() or list(tmp_path.glob(".a.*"))) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        child.kill()
        child.wait()
        if target.exists():
            content = target.read_bytes()
            assert set(content) == {content[0]}
            assert len(content) == 1000 * (100 + content[0])
            target.unlink()
        files.sweep(tmp_path)
    assert os.listdir(tmp_path) == []

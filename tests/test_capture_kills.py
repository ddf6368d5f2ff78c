"""Capture under kills: of the process, of a rank, of the writer, at every file operation and at seeded moments; then the same
command gives the bytes of an uninterrupted run, and does again at most one file a writer.
"""

import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.activations import ActivationsConfig, run
from capture.remote import fetch
from core import files
from core.cli import one_line_errors, parse
from core.runtime import open_runtime
from tests.conftest import ROOT, Launch
from tests.faults import ForkServer, fail_at
from tests.processes import abandoned, group_members, shared_memory
from tests.test_capture import FLAGS, capture, command, contents, write_corpus
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `corpus` and `clean`, an uninterrupted run."""
    folder = tmp_path_factory.mktemp("kills")
    tiny_llama(folder / "model")
    write_corpus(folder)
    capture(folder / "model", folder / "corpus", folder / "clean")
    return folder


def resume(tiny: Path, out: Path, writers: int = 1) -> None:
    """The same command again, then the bytes of the uninterrupted run; at most one file a writer was made again, and none under
    its final name was less than whole.
    """
    there = set(out.rglob("*.safetensors"))
    assert all(path.read_bytes() == (tiny / "clean" / path.relative_to(out)).read_bytes() for path in there)
    again: list[Path] = []

    def watch(operation: str, path: Path) -> None:
        if operation == "rename" and path in there:
            again.append(path)

    files.before_operation = watch
    capture(tiny / "model", tiny / "corpus", out)
    assert contents(out) == contents(tiny / "clean")
    assert len(again) <= writers


def n_operations(tiny: Path, out: Path) -> int:
    operations: list[str] = []
    files.before_operation = fail_at(0, operations)
    capture(tiny / "model", tiny / "corpus", out)
    return len(operations)


# --- every file operation --------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("for_good", [False, True])
def test_an_error_at_every_file_operation(tiny: Path, memory_path: Path, for_good: bool) -> None:
    """Of that operation alone, or of all from it on, as when a disk is gone."""
    for n in range(1, n_operations(tiny, memory_path / "whole") + 1):
        out = memory_path / f"at{n}"
        files.before_operation = fail_at(n, for_good=for_good)
        with pytest.raises(OSError, match="injected"):
            capture(tiny / "model", tiny / "corpus", out)
        resume(tiny, out)
        shutil.rmtree(out)


# --- seeded moments --------------------------------------------------------------------------------------------------------


def until(hits: int, trial: Callable[[int], bool]) -> None:
    """Call `trial` with 0, 1, ... until it has said True `hits` times."""
    done = 0
    for n in range(5 * hits):
        done += trial(n)
        if done == hits:
            return
    raise AssertionError(f"only {done} of {5 * hits} faults met a job that was running")


def seconds_of(tiny: Path, folder: Path, fork_server: ForkServer, run: Callable[..., None]) -> float:
    """Of an undisturbed run, the second of two: the first pays for what is loaded late."""
    for attempt in range(2):
        began = time.monotonic()
        assert fork_server.run(run, tiny / "model", tiny / "corpus", folder / f"whole{attempt}") == 0
    return time.monotonic() - began


@pytest.mark.faults
@pytest.mark.parametrize(("name", "hits"), [("SIGKILL", 50), ("SIGTERM", 20)])
def test_the_process_killed_at_moments(tiny: Path, memory_path: Path, fork_server: ForkServer, name: str, hits: int) -> None:
    whole = seconds_of(tiny, memory_path, fork_server, capture)
    chance = random.Random(0)

    def trial(n: int) -> bool:
        out, signal_ = memory_path / f"moment{n}", int(signal.Signals[name])
        moment = chance.uniform(0, whole)
        status = fork_server.run(capture, tiny / "model", tiny / "corpus", out, kill_after=moment, kill_with=signal_)
        assert status in (0, -signal_)
        resume(tiny, out)
        shutil.rmtree(out)
        return status < 0

    until(hits, trial)


def capture_to(model: str, corpus: str, out: str) -> None:
    """Into a store, at file://."""
    capture(model, corpus, f"{out}-work", remote=Path(out).as_uri())


@pytest.mark.faults
def test_killed_while_writing_to_a_store(tiny: Path, memory_path: Path, fork_server: ForkServer) -> None:
    whole = seconds_of(tiny, memory_path, fork_server, capture_to)
    chance = random.Random(1)

    def trial(n: int) -> bool:
        arguments = (tiny / "model", tiny / "corpus", memory_path / f"moment{n}")
        status = fork_server.run(capture_to, *arguments, kill_after=chance.uniform(0, whole))
        capture_to(*map(str, arguments))
        fetch(arguments[2].as_uri(), memory_path / "fetched")
        assert contents(memory_path / "fetched") == contents(tiny / "clean")
        shutil.rmtree(memory_path / "fetched")
        return status < 0

    until(10, trial)


# --- the writer ------------------------------------------------------------------------------------------------------------


def capture_with_killed_writer(model: str, corpus: str, out: str, moment: str) -> None:
    """The stage as its command line runs it; `moment` seconds after it began, its writer's thread is ended from outside."""

    def kill() -> None:
        writers: list[threading.Thread] = []
        while not writers:
            time.sleep(0.001)
            writers = [thread for thread in threading.enumerate() if thread.name == "capture-writer"]
        time.sleep(float(moment))
        assert writers[0].ident
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(writers[0].ident), ctypes.py_object(SystemExit))
        Path(f"{out}-killed").write_text(str(time.time()))

    threading.Thread(target=kill, daemon=True).start()
    with Path(f"{out}-said").open("w") as said, contextlib.redirect_stderr(said):
        command("--model", model, "--corpus", corpus, "--out", out, *FLAGS)


def killed_writer(tiny: Path, out: Path, fork_server: ForkServer, moment: float) -> bool:
    """Whether the fault met the writer at work; if so, the job ended in 10 s and named it."""
    status = fork_server.run(capture_with_killed_writer, tiny / "model", tiny / "corpus", out, moment)
    ended = time.time()
    if status:
        assert status == 2
        assert ended - float(Path(f"{out}-killed").read_text()) < 10
        said = Path(f"{out}-said").read_text()
        assert re.search(r"error: the writer ended at \S.*: (SystemExit|it was killed); the same command continues", said), said
    resume(tiny, out)
    shutil.rmtree(out)
    return bool(status)


def test_a_killed_writer_is_named(tiny: Path, memory_path: Path, fork_server: ForkServer) -> None:
    chance = random.Random(0)
    until(1, lambda n: killed_writer(tiny, memory_path / f"moment{n}", fork_server, chance.uniform(0, 0.05)))


@pytest.mark.faults
def test_the_writer_killed_at_fifty_moments(tiny: Path, memory_path: Path, fork_server: ForkServer) -> None:
    whole = seconds_of(tiny, memory_path, fork_server, capture)
    chance = random.Random(0)
    until(50, lambda n: killed_writer(tiny, memory_path / f"moment{n}", fork_server, chance.uniform(0, whole / 2)))


# --- ranks -----------------------------------------------------------------------------------------------------------------


NEVER = -1.0


def two_ranks(model: str, corpus: str, out: str, victim: str, moment: str) -> None:
    """Two ranks without a launcher, of which `victim` is killed `moment` seconds after they met. Writes the exit status of
    both, and the seconds from then until both were gone, to `out`-ranks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_start_rank(rank, port, model, corpus, out) for rank in range(2)]
    while not Path(out, files.LOCK).exists():
        time.sleep(0.001)
    began = time.monotonic()
    if float(moment) != NEVER:
        time.sleep(float(moment))
        os.kill(ranks[int(victim)], signal.SIGKILL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    Path(f"{out}-ranks").write_text(json.dumps([*statuses, time.monotonic() - began]))


def _start_rank(rank: int, port: int, model: str, corpus: str, out: str) -> int:
    process = os.fork()
    if process:
        return process
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    flags = ("--model", model, "--corpus", corpus, "--out", out, *FLAGS, "--timeout-s", 30)
    status = 0
    with Path(f"{out}-said-{rank}").open("w") as said, contextlib.redirect_stderr(said):
        try:
            with one_line_errors(rank):
                config = parse(ActivationsConfig, "", [str(flag) for flag in flags])
                with open_runtime("cpu", threads=1, timeout_s=config.timeout_s) as runtime:
                    run(config, runtime)
        except SystemExit as exit_:
            status = int(str(exit_.code))
        except BaseException:
            traceback.print_exc()
            status = 1
    os._exit(status)


@pytest.mark.faults
def test_a_rank_killed_at_fifty_moments(tiny: Path, memory_path: Path, fork_server: ForkServer) -> None:
    """Either of two, whichever holds the store of the group; the other ends too, and says for want of whom."""
    before = shared_memory()
    for attempt in range(2):
        arguments = (tiny / "model", tiny / "corpus", memory_path / f"whole{attempt}", 0, NEVER)
        assert fork_server.run(two_ranks, *arguments) == 0
    *statuses, whole = json.loads((memory_path / "whole1-ranks").read_text())
    assert statuses == [0, 0]
    chance = random.Random(0)

    def trial(n: int) -> bool:
        out, victim = memory_path / f"moment{n}", n % 2
        assert fork_server.run(two_ranks, tiny / "model", tiny / "corpus", out, victim, chance.uniform(0, whole)) == 0
        *statuses, seconds = json.loads(Path(f"{out}-ranks").read_text())
        said = Path(f"{out}-said-{1 - victim}").read_text()
        assert statuses[victim] in (0, -9)
        assert statuses[1 - victim] in (0, 2), said
        if statuses[1 - victim]:
            assert seconds < 60
            assert re.search(r"a rank ended \(see its own message\) or did not answer", said), said
        resume(tiny, out, writers=2)
        assert not abandoned(before)
        shutil.rmtree(out)
        return statuses[victim] == -9 and statuses[1 - victim] == 2

    until(50, trial)


def test_two_ranks_then_one_then_three(tiny: Path, tmp_path: Path, fork_server: ForkServer, launch: Launch) -> None:
    """Two ranks that are killed, one that is killed, and three to the end."""
    out = tmp_path / "acts"
    flags = ("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", out, *FLAGS, "--timeout-s", 20)
    lost = launch("-m", "tests.capture_ranks", "end", "all", 30, *flags, ranks=2, limit=400)
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


@pytest.mark.faults
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_and_ended(tiny: Path, tmp_path: Path, frozen: int) -> None:
    """The other waits no longer than --timeout-s; then torchrun ends the frozen one, with its 30 s of grace."""
    flags = ("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", tmp_path / "acts", *FLAGS, "--timeout-s", 5)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = (sys.executable, *torchrun, "-m", "tests.capture_ranks", "freeze", frozen, 20, *flags)
    began = time.monotonic()
    job = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    _, said = job.communicate(timeout=200)
    assert job.returncode != 0
    assert f"did not answer within --timeout-s 5 (no sign of rank(s) {frozen})" in said
    assert time.monotonic() - began < 90  # 60 of the fault's, and the start of two processes
    assert not group_members(job.pid)
    resume(tiny, tmp_path / "acts", writers=2)


# --- nothing left behind ---------------------------------------------------------------------------------------------------


def test_a_killed_job_leaves_no_process_and_no_shared_memory(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And while it is there, even frozen, a second job is refused."""
    before = shared_memory()
    flags = ("--model", tiny / "model", "--corpus", tiny / "corpus", "--out", tmp_path / "acts", *FLAGS)
    job = subprocess.Popen(
        [sys.executable, "-m", "capture.activations", *map(str, flags)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while job.poll() is None and not list((tmp_path / "acts").rglob("*.safetensors")):
        time.sleep(0.001)
    job.send_signal(signal.SIGSTOP)
    if (tmp_path / "acts" / files.LOCK).exists():
        with pytest.raises(SystemExit):
            command(*flags)
        assert f"another job is writing here (host {os.uname().nodename}, process {job.pid})" in capsys.readouterr().err
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not group_members(job.pid)
    assert not abandoned(before)
    resume(tiny, tmp_path / "acts")

"""core/runtime.py: two ranks over gloo agree, none is left waiting, and one process takes the same path."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from core.files import locked
from core.runtime import Comm, Runtime, Solo, environment_rank, open_runtime, pick_device, seed_everything
from tests.conftest import ROOT, Launch

SCRIPT = '''
import ctypes, json, os, sys, time
from pathlib import Path
import torch
from core.artifact import building
from core.cli import StageConfig
from core.ending import end_at_sigterm
from core.files import locked
from core.runtime import open_runtime

def collectives(runtime, folder):
    r = runtime.rank
    t = torch.tensor([1.0 + r, 10.0])
    answers = {
        "sum": runtime.comm.sum_(t).tolist(), "in_place": t.tolist(),
        "max": runtime.comm.max_(torch.tensor([r, 5 - r])).tolist(),
        "broadcast": runtime.comm.broadcast_(torch.full((2,), float(r + 7))).tolist(),
        "gather": runtime.gather_objects({"rank": r}),
        "share": list(runtime.share(5)),
        "on_main": runtime.on_main(lambda: f"rank {r} did it"),
        "main": runtime.is_main, "world": runtime.world_size, "seed": torch.initial_seed(), "threads": torch.get_num_threads(),
    }
    runtime.barrier()
    try:
        runtime.on_main(lambda: open("/nowhere/x"))
    except FileNotFoundError as error:
        answers["error"] = str(error)
    (folder / f"answers-{r}.json").write_text(json.dumps(answers))

def build(runtime, folder):
    with building(folder / "out", "things", StageConfig(), runtime) as builder:
        for i in runtime.share(5):
            builder.publish(f"chunk-{i}", bytes([i]) * 1000, rows=i)
        builder.finish([f"chunk-{i}" for i in runtime.share(5)], {"chunks": 5})
        assert builder.complete
    with building(folder / "out", "things", StageConfig(), runtime) as builder:
        assert builder.complete

def in_use(runtime, folder):
    """Rank 0 finds the folder locked; a rank that waited for it would hang."""
    try:
        with building(folder / "busy", "things", StageConfig(), runtime):
            text = "built"
    except ValueError as error:
        text = str(error)
    (folder / f"busy-{runtime.rank}.txt").write_text(text)

def late(runtime, folder):
    if runtime.rank == 1:
        time.sleep(600)
    runtime.barrier()

def busy(runtime, folder):
    if runtime.rank == 1:
        time.sleep(600)
    runtime.comm.sum_(torch.ones(3))

def gone(runtime, folder):
    if runtime.rank == 1:
        os._exit(0)  # any other code, and torchrun may end the peer before it has said what it saw
    runtime.gather_objects(1)

def at_work(runtime, folder):
    """Rank 1 says that it is there and works on; rank 0 works on and asks nothing of anybody."""
    (folder / f"at-work-{runtime.rank}").write_text(str(os.getpid()))
    time.sleep(600)

def waiting(runtime, folder):
    """Rank 0 is inside a collective, where it hears no signal."""
    (folder / f"at-work-{runtime.rank}").write_text(str(os.getpid()))
    if runtime.rank == 1:
        time.sleep(600)
    runtime.gather_objects(1)

def deaf(runtime, folder):
    """Rank 1 lets no other thread of its own run for longer than a rank may be silent, as some libraries do."""
    if runtime.rank == 1:
        ctypes.PyDLL(None).usleep(7_000_000)
    else:
        time.sleep(7)
    runtime.barrier()
    (folder / "ended").touch()

def leaves_early(runtime, folder):
    """Rank 1 has nothing to do; rank 0 works on for much longer than a rank may be silent."""
    if runtime.rank == 0:
        time.sleep(6)
        (folder / "ended").touch()

end_at_sigterm()
folder, timeout_s = Path(sys.argv[1]), float(sys.argv[2])
with open_runtime("cpu", threads=1, seed=11, timeout_s=timeout_s) as runtime:
    for name in sys.argv[3:]:
        try:
            globals()[name](runtime, folder)
        except OSError as error:
            print(f"<{type(error).__name__} on rank {runtime.rank}: {error}>", file=sys.stderr, flush=True)
            raise SystemExit(2)
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def answers(rank: int, world: int) -> dict[str, object]:
    """What `collectives` must say on `rank` of `world`."""
    ranks = range(world)
    return {
        "sum": [sum(1.0 + r for r in ranks), 10.0 * world], "in_place": [sum(1.0 + r for r in ranks), 10.0 * world],
        "max": [world - 1, 5], "broadcast": [7.0, 7.0], "gather": [{"rank": r} for r in ranks],
        "share": list(range(5))[rank::world], "on_main": "rank 0 did it", "main": rank == 0, "world": world, "seed": 11,
        "threads": 1, "error": "[Errno 2] No such file or directory: '/nowhere/x'",
    }  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_two_ranks_do_what_one_does(tmp_path: Path, script: Path, launch: Launch) -> None:
    """Collectives, an artifact whose bytes do not tell the number of ranks, and the refusal of a lock that reaches both.

    The time-out is far longer than that of this test, so that a rank left waiting fails it.
    """
    one, two = tmp_path / "1", tmp_path / "2"
    for ranks, folder in ((1, one), (2, two)):
        with locked(folder / "busy"):
            done = launch(script, folder, 3600, "collectives", "build", "in_use", ranks=ranks, limit=300)
        assert done.returncode == 0, done.stderr
        for rank in range(ranks):
            assert json.loads((folder / f"answers-{rank}.json").read_text()) == answers(rank, ranks)
            assert "another job is writing here (host" in (folder / f"busy-{rank}.txt").read_text()
    assert contents(one / "out") == contents(two / "out")
    assert len(contents(one / "out")) == 6


def test_a_barrier_names_the_rank_that_does_not_come(tmp_path: Path, script: Path, launch: Launch) -> None:
    done = launch(script, tmp_path, 5, "late", ranks=2, limit=300)
    assert done.returncode != 0
    assert "<ConnectionError on rank 0: a barrier between the processes of this job failed: " in done.stderr
    assert "Ranks 1 failed" in done.stderr
    assert "did not answer within --timeout-s 5" in done.stderr


def test_a_sum_names_the_rank_that_does_not_come(tmp_path: Path, script: Path, launch: Launch) -> None:
    """Of three, the two that wait name the one that they wait for."""
    done = launch(script, tmp_path, 5, "busy", ranks=3, limit=300)
    assert done.returncode != 0
    assert re.search(
        r"<ConnectionError on rank \d: a sum between .* within --timeout-s 5 \(no sign of rank\(s\) 1\)>", done.stderr
    )
    assert "no sign of rank(s) 0" not in done.stderr


def test_a_rank_that_ends_does_not_leave_the_other_waiting(tmp_path: Path, script: Path, launch: Launch) -> None:
    done = launch(script, tmp_path, 3600, "gone", ranks=2, limit=300)
    assert done.returncode != 0
    assert "<ConnectionError on rank 0: gathering between the processes of this job failed: " in done.stderr


@contextmanager
def two_ranks(script: Path, folder: Path, timeout_s: float, name: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Both ranks without torchrun, which would end one when the other ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    # as torchrun's agent does, a process that is no rank holds the store
    store = subprocess.Popen([sys.executable, "-c", STORE, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert store.stdout
    assert store.stdout.readline() == "ready\n"
    ranks = []
    try:
        for rank in range(2):
            environment = os.environ | world | {"RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            command = [sys.executable, str(script), str(folder), str(timeout_s), name]
            ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        yield ranks
    finally:
        for process in (*ranks, store):
            process.kill()
            process.communicate()


STORE = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
sys.stdin.read()
"""


def at_work(folder: Path, ranks: Sequence["subprocess.Popen[str]"]) -> None:
    deadline = time.monotonic() + 100
    while not all((folder / f"at-work-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "timeout_s", "silence_s"), [("at_work", 5, 5), pytest.param("waiting", 3600, 20, marks=pytest.mark.faults)]
)
def test_a_frozen_rank_is_named_whatever_the_others_do(
    tmp_path: Path, script: Path, name: str, timeout_s: float, silence_s: int
) -> None:
    """Long before the time-out of a collective, of which there may be none."""
    with two_ranks(script, tmp_path, timeout_s, name) as ranks:
        at_work(tmp_path, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        _, said = ranks[0].communicate(timeout=100)
        assert silence_s / 2 < time.monotonic() - began < 3 * silence_s, "a moment's pause ends nothing"
    assert ranks[0].returncode == 2
    assert f"error (rank 0): rank 1 has given no sign of life for {silence_s} s" in said


def test_a_killed_rank_is_named(tmp_path: Path, script: Path) -> None:
    with two_ranks(script, tmp_path, 3600, "waiting") as ranks:
        at_work(tmp_path, ranks)
        ranks[1].kill()
        _, said = ranks[0].communicate(timeout=100)
    assert ranks[0].returncode == 2
    assert re.search(r"<ConnectionError on rank 0: gathering .*\(rank\(s\) 1 ended, were killed or froze\)>", said)


def test_sigterm_names_the_rank_that_was_killed(tmp_path: Path, script: Path) -> None:
    """As torchrun sends it to the others."""
    with two_ranks(script, tmp_path, 3600, "at_work") as ranks:
        at_work(tmp_path, ranks)
        ranks[1].kill()
        ranks[1].wait()
        ranks[0].terminate()
        _, said = ranks[0].communicate(timeout=100)
    assert ranks[0].returncode == 128 + signal.SIGTERM
    assert "asked to stop (SIGTERM); what is finished is kept (rank(s) 1 ended, were killed or froze)\n" in said


def test_sigterm_reaches_a_rank_that_waits_for_another(tmp_path: Path, script: Path) -> None:
    with two_ranks(script, tmp_path, 3600, "waiting") as ranks:
        at_work(tmp_path, ranks)
        time.sleep(1)
        ranks[0].terminate()
        _, said = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 128 + signal.SIGTERM
    assert "asked to stop (SIGTERM)" in said


@pytest.mark.parametrize(("name", "timeout_s"), [("leaves_early", 2), ("deaf", 6)])
def test_a_rank_that_leaves_early_or_is_busy_is_not_given_up(
    tmp_path: Path, script: Path, launch: Launch, name: str, timeout_s: float
) -> None:
    done = launch(script, tmp_path, timeout_s, name, ranks=3, limit=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ended").exists()
    assert "no sign of life" not in done.stderr


def test_one_process_has_the_answers_of_a_group_of_one() -> None:
    comm: Comm = Solo()
    tensor = torch.tensor([1.0, 2.0])
    assert comm.sum_(tensor) is comm.max_(tensor) is comm.broadcast_(tensor) is tensor
    runtime = Runtime(0, 1, torch.device("cpu"), comm)
    runtime.barrier()
    assert runtime.gather_objects("x") == ["x"]
    assert runtime.on_main(lambda: "done") == "done"
    with pytest.raises(ValueError, match="wrong"):
        runtime.on_main(lambda: int("wrong"))
    assert list(runtime.share(3)) == [0, 1, 2]
    assert list(runtime.share(0)) == []


def test_shares_of_all_ranks_are_all_items_once() -> None:
    for world in (1, 2, 3, 8):
        shares = [Runtime(rank, world, torch.device("cpu"), Solo()).share(7) for rank in range(world)]
        assert sorted(i for share in shares for i in share) == list(range(7))


def test_rank_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment_rank() == (0, 0, 1)
    for name, value in (("RANK", "9"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    assert environment_rank() == (9, 1, 16)


@pytest.mark.parametrize(
    ("name", "gpus", "local_rank", "world", "found"),
    [
        ("auto", 0, 0, 1, "cpu"),
        ("auto", 2, 1, 2, "cuda:1"),
        ("cpu", 2, 1, 2, "cpu"),
        ("cuda", 2, 0, 2, "cuda:0"),
        ("cuda:1", 2, 0, 1, "cuda:1"),
        ("cuda", 0, 0, 1, "no GPU is visible to PyTorch; use --device cpu"),
        ("auto", 1, 1, 2, "GPU 1 is needed, but only 1 are visible; lower --nproc_per_node"),
        ("cuda:2", 2, 0, 1, "GPU 2 is needed, but only 2 are visible; choose a lower number"),
        ("cuda:0", 2, 1, 2, "all 2 ranks would share one GPU"),
        ("cuda:x", 2, 0, 1, "expected auto, cpu, cuda or cuda:N"),
        ("mps", 0, 0, 1, "expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_the_device_is_that_of_the_local_rank(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, local_rank: int, world: int, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if found.split(":")[0] in ("cpu", "cuda"):
        assert pick_device(name, local_rank, world) == torch.device(found)
    else:
        with pytest.raises(ValueError, match=found):
            pick_device(name, local_rank, world)


def test_seeds_reach_all_three_generators() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw(-3)
    assert draw(-3) == first
    assert all(a != b for a, b in zip(first, draw(4), strict=True))


def test_threads_and_seed_are_set_and_nothing_else_is_touched() -> None:
    before = torch.get_num_threads()
    try:
        with open_runtime("cpu", threads=1, seed=3) as runtime:
            assert torch.get_num_threads() == 1
            assert torch.initial_seed() == 3
            assert (runtime.rank, runtime.world_size, runtime.device.type) == (0, 1, "cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.get_default_dtype() == torch.float32

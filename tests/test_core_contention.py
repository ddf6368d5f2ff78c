"""A machine that others use too: how it is noticed, and said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import contention
from core.contention import Waiting
from core.progress import Progress
from demo import doctor
from tests.conftest import ROOT

WORK = """
import os, sys, time
from core.contention import Waiting
os.sched_setaffinity(0, {int(sys.argv[1])})
waiting = Waiting()
ends = time.monotonic() + 60
while sum(os.times()[:2]) < 0.5 and time.monotonic() < ends:
    pass
print(waiting.share())
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not say how long threads wait")
def test_three_that_share_a_core_wait_for_it() -> None:
    """Each has work all the time, and a third of the core."""
    core = str(min(os.sched_getaffinity(0)))
    command = [sys.executable, "-c", WORK, core]
    all_three = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    shares = [float(one.communicate()[0]) for one in all_three]
    assert max(shares) > 0.4
    assert all(0 <= share < 1 for share in shares)


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention, "_scheduled", dict)
    assert Waiting().share() == 0.0
    assert Waiting().notes() == {}


@pytest.mark.parametrize(("ran", "waited", "said"), [(80, 19, ""), (80, 20, "20% of the time"), (0, 0, "")])
def test_progress_says_so_where_it_is_much(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ran: int, waited: int, said: str
) -> None:
    """A thread that has ended meanwhile, and one that is new, count for what is known of them."""
    states = iter([{"1": (5, 5), "2": (7, 9)}, {"1": (5 + ran // 2, 5 + waited), "3": (ran - ran // 2, 0)}])
    monkeypatch.setattr(contention, "_scheduled", lambda: next(states))
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr("core.progress.time.monotonic", lambda: next(clock))
    with caplog.at_level("INFO"), Progress("reading", 3, "files") as bar:
        bar.update(1)
    assert ("without a core" in caplog.text) == bool(said)
    assert said in caplog.text


@pytest.mark.parametrize(
    ("content", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("rubbish", None), (None, None)]
)
def test_the_quota_of_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, quota: float | None
) -> None:
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(contention, "Path", lambda path: tmp_path / Path(path).name)
    assert contention.core_quota() == quota


def test_the_doctor_says_what_is_left_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: 8)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 8)
    for load, quota, expected in ((1.25, None, "6.8 cores are free"), (9.0, 2.5, "contended"), (8.0, 8.0, "contended")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        monkeypatch.setattr(doctor, "core_quota", lambda quota=quota: quota)
        said = " ".join(finding.found for finding in doctor._cores())
        assert expected in said
        assert ("--threads 2" in said) == (quota == 2.5)


@pytest.mark.parametrize("package", ["capture", "sae.model", "llama3", "interpretability", "inference", "llama3_sae", "demo"])
def test_openmp_is_told_before_pytorch_is_loaded(package: str) -> None:
    """At the first import of torch, which fails here, the variable is there; one of the user's own stays."""
    code = f"""
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name in ("torch", "numpy", "pyarrow"):
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)
sys.meta_path.insert(0, Finder())
import {package}
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for variables, expected in (({}, "2000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | variables, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr

"""core/ending.py: Ctrl-C and SIGTERM end a stage in one line, from the first import on, and change nothing for importers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

MODULES = ("capture.sentences", "sae.train", "interpretability.report", "inference.complete", "demo")

SLOW = """
import os, signal, time
os.kill(os.getpid(), signal.{name})
time.sleep(60)
"""


def started(*command: object, cwd: Path = ROOT, path: Path = ROOT) -> "subprocess.Popen[str]":
    """A process that hears Ctrl-C even where who runs the tests does not."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        environment = os.environ | {"PYTHONPATH": f"{path}:{ROOT}"}
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, kept)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("SIGINT", -signal.SIGINT, "interrupted; the same command continues from here"),
        ("SIGTERM", 128 + signal.SIGTERM, "asked to stop (SIGTERM); what is finished is kept"),
    ],
)
def test_signals_during_imports(tmp_path: Path, module: str, name: str, code: int, line: str) -> None:
    """The signal comes while the stage imports what all of them import."""
    (tmp_path / "numpy.py").write_text(SLOW.format(name=name))
    with started("-m", module, path=tmp_path) as process:
        _, said = process.communicate(timeout=60)
    assert said.splitlines() == [line]
    assert process.returncode == code


STAGE = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from core.artifact import building
from core.cli import StageConfig, run_stage
from sae.checkpoint import stop_signals

@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    out: Path
    how: str

def run(config, runtime):
    with building(config.out, "things", config, runtime) as builder:
        builder.publish("one", b"1")
        if config.how == "fork" and os.fork() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        if config.how == "fork":
            print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
            time.sleep(7)  # longer than a process may stay deaf
            return
        if config.how == "another listens":
            with stop_signals() as wish:
                os.kill(os.getpid(), signal.SIGTERM)
                while not wish.signal:
                    time.sleep(0.01)
            time.sleep(7)  # what it was asked for may take its time
            return
        print("ready", flush=True)
        while True:
            time.sleep(1)

run_stage(Config, run, "A stage.")
"""


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    (tmp_path / "stage.py").write_text(STAGE)
    return tmp_path / "stage.py"


def test_sigterm_ends_a_stage_in_one_line_and_leaves_no_lock(stage: Path, tmp_path: Path) -> None:
    with started(stage, "--out", tmp_path / "out", "--how", "busy") as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.splitlines() == ["asked to stop (SIGTERM); what is finished is kept"]
    assert sorted(os.listdir(tmp_path / "out")) == [".journal-0.jsonl", "manifest.json", "one"]


def test_sigterm_to_a_forked_child_is_the_childs_alone(stage: Path, tmp_path: Path) -> None:
    with started(stage, "--out", tmp_path / "out", "--how", "fork") as process:
        out, said = process.communicate(timeout=60)
    assert (out, said, process.returncode) == ("-15\n", "", 0)


def test_sigterm_that_training_hears_is_trainings_alone(stage: Path, tmp_path: Path) -> None:
    with started(stage, "--out", tmp_path / "out", "--how", "another listens") as process:
        out, said = process.communicate(timeout=100)
    assert (out, said, process.returncode) == ("", "", 0)


def test_nothing_changes_for_who_imports_the_packages() -> None:
    code = """if True:
        import signal, sys
        import capture, demo, inference, interpretability, sae
        import sae.train, capture.sentences
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.set_wakeup_fd(-1) == -1
        assert sys.excepthook is sys.__excepthook__
        """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

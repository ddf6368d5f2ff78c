"""Weights & Biases beside training, against a stand-in for its server: whatever that does, training does not notice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae import wandb
from sae.wandb import Wandb, wanted
from sae.wandb_copy import follow
from tests.conftest import ROOT
from tests.fake_wandb import FakeWandb
from tests.sae_folders import make_batches, sparse_rows

KEY = "0123456789" * 4


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows, _ = sparse_rows(750, 10, 30, active=3)
    return make_batches(tmp_path_factory.mktemp("rows"), rows + 0.5, batch_rows=32)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[FakeWandb]:
    server = FakeWandb(getattr(request, "param", "serve"))
    yield server
    server.die()


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`at(url)`: an environment with a key and that server, and no other setting of the library."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)

    def set_to(url: str, **more: str) -> None:
        wanted = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        for name, value in (wanted | more).items():
            monkeypatch.setenv(name, value)

    return set_to


def train(batches: Path, out: Path, steps: int = 6, *more: str) -> "subprocess.CompletedProcess[str]":
    flags = ["--n-latents", "16", "--k", "2", "--batch-size", "60", "--max-steps", str(steps), "--log-every", "1", *more]
    command = [sys.executable, "-m", "sae.train", "--batches", str(batches), "--out", str(out), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def steps_in(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def copies(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.rglob("*.wandb"))]


def test_every_line_reaches_the_server(at: Any, server: FakeWandb, batches: Path, tmp_path: Path) -> None:
    at(server.url, WANDB_PROJECT="mine", WANDB_RUN_ID="abc")
    done = train(batches, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert server.projects == {"mine"}
    assert sorted(server.history["abc"]) == [1, 2, 3, 4, 5, 6]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    line["_step"] = line.pop("step")
    assert line.pop("xxh3") not in server.history["abc"][6].values()
    assert {name: server.history["abc"][6][name] for name in line} == line


@pytest.mark.parametrize("server", ["hang", "error", "refuse"], indirect=True)
def test_a_server_that_does_not_serve(at: Any, server: FakeWandb, batches: Path, tmp_path: Path) -> None:
    """Training ends as without it; one warning, and a run for `wandb sync`."""
    if server.manner == "refuse":
        server.die()
    at(server.url)
    done = train(batches, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("W&B:") == 1
    assert "wandb sync" in done.stderr
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert any(b"since_fired_histogram" in copy for copy in copies(tmp_path / "run"))
    assert (tmp_path / "run" / "sae" / "manifest.json").is_file()


def test_training_does_not_wait(at: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start and `check` return at once while a server hangs, and `close` in time."""
    server = FakeWandb("hang")
    at(server.url)
    monkeypatch.setattr(wandb, "OPEN_S", 0.5)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    began = time.monotonic()
    copy = Wandb(tmp_path, "online", {}, 0)
    for _ in range(100):
        copy.check()
    assert time.monotonic() - began < 1
    copy.close()
    assert time.monotonic() - began < 60
    server.die()


def test_a_server_that_dies_while_a_run_goes_on(
    at: Any, server: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at(server.url)
    monkeypatch.setattr(wandb, "FINISH_S", 1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n')
    copy = Wandb(tmp_path, "online", {}, 0)
    assert server.opened.wait(120)
    server.die()
    with path.open("a") as file:
        file.write('{"step": 2, "the_second": 0.25}\n')
    copy.check()
    copy.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "wandb sync" in caplog.text
    assert any(b"the_second" in copy for copy in copies(tmp_path))


def test_a_run_that_is_continued_continues_there(at: Any, server: FakeWandb, tmp_path: Path) -> None:
    at(server.url)
    path = tmp_path / "metrics.jsonl"
    for after, lines in ((0, range(1, 4)), (2, range(1, 6))):
        path.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in lines))
        Wandb(tmp_path, "online", {}, after).close()
    (run,) = server.history.values()
    assert sorted(run) == [1, 2, 3, 4, 5]
    assert [run[step]["loss"] for step in sorted(run)] == [1 / step for step in range(1, 6)]


def test_a_trainer_that_is_killed_leaves_no_process(at: Any, tmp_path: Path) -> None:
    server = FakeWandb("hang")
    at(server.url)
    (tmp_path / "metrics.jsonl").write_text("")
    code = (
        "import time; from pathlib import Path; from sae import wandb; wandb.OPEN_S = 1.0\n"
        f"copy = wandb.Wandb(Path({str(tmp_path)!r}), 'online', {{}}, 0); print(copy._child.pid, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    for _ in range(600):
        if not alive(pid):
            break
        time.sleep(0.1)
    assert not alive(pid)
    server.die()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": KEY}, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "off"),
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, "off"),
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "false"}, "online"),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "perhaps"}, "offline"),
    ],
)
def test_what_the_environment_asks_for(environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wanted("auto") == mode
    assert [wanted("off"), wanted("online"), wanted("offline")] == ["off", "online", "offline"]


def test_lines_are_followed_whole(tmp_path: Path) -> None:
    """A line that is only half written yet is waited for."""
    path, ended = tmp_path / "metrics.jsonl", threading.Event()
    path.write_text('{"step": 1}\n{"st')
    lines = follow(path, ended)
    assert next(lines) == {"step": 1}
    with path.open("a") as file:
        file.write('ep": 2}\n{"step": 3}\n{"torn')
    assert next(lines) == {"step": 2}
    ended.set()
    assert list(lines) == [{"step": 3}]

"""Weights & Biases beside training: what the environment asks for, and the process that makes the copy (sae.wandb_copy)."""

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core import files
from sae import wandb_copy

log = logging.getLogger("sae.train")

WandbMode = Literal["auto", "off", "offline", "online"]
MODES = {"online": "online", "shared": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
YES = ("1", "true", "yes", "on")
OPEN_S, FINISH_S, OFFLINE_S = 5.0, 10.0, 60.0  # after the end of training; the last one covers a copy that needs no server


def wanted(mode: WandbMode) -> str:
    """online, offline or off. `auto` is what WANDB_DISABLED and WANDB_MODE say, else online where WANDB_API_KEY is set."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_DISABLED", "").lower() in YES:
        return "off"
    if given := os.environ.get("WANDB_MODE", "").lower():
        if given not in MODES:
            log.warning("WANDB_MODE: expected one of %s; found %r; W&B stays offline", ", ".join(MODES), given)
        return MODES.get(given, "offline")
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


@dataclass
class Wandb:
    """The copy of `out`/metrics.jsonl. A copy for looking at: nothing is ever read back, and no error of it reaches training.

    Its files lie in `out`/wandb, the run's id among them: a run that is continued continues there too.
    """

    out: Path
    mode: str
    config: dict[str, Any]
    after: int
    """The step that training continues from."""
    _child: "subprocess.Popen[bytes] | None" = field(init=False)

    def __post_init__(self) -> None:
        self._child = self._start()

    def check(self) -> None:
        """Warn, once, where the copy has ended before training did."""
        if self._child is not None and self._child.poll() is not None:
            self._end(self._child)

    def close(self) -> None:
        """Training is over: let the rest go out, for a few seconds at most."""
        while self._child is not None:
            self._end(self._child)

    def _end(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = None
        if _ended(child):
            log.warning("W&B: %s; nothing is lost: %s has all lines", self._why(), self._kept())
            if self.mode == "online":  # anew from the first line: the library may not have written down what it had
                self.mode = "offline"
                self._child = self._start()

    def _kept(self) -> str:
        """Where the lines are."""
        offline = f"{self._folder}/offline-run-* (`wandb sync` sends it)"
        return offline if self.mode == "online" else f"{self.out}/metrics.jsonl"

    @property
    def _folder(self) -> Path:
        return self.out / "wandb"

    def _why(self) -> str:
        lines = (self._folder / "copy.log").read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "the copy ended without a word")

    def _start(self) -> "subprocess.Popen[bytes] | None":
        files.make_folder(self._folder)
        order = wandb_copy.Order(
            metrics=str((self.out / "metrics.jsonl").absolute()),
            folder=str(self.out.absolute()),
            mode=self.mode,
            run_id=_run_id(self._folder / "run_id.txt"),
            after=self.after,
            config=self.config,
            open_s=OPEN_S if self.mode == "online" else OFFLINE_S,
            finish_s=FINISH_S if self.mode == "online" else OFFLINE_S,
        )
        # A session of its own: Ctrl-C and a launcher's signals are for training. -P: our modules hide none of the library's.
        command = [sys.executable, "-P", wandb_copy.__file__]
        try:
            with (self._folder / "copy.log").open("wb") as errors:
                child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
                )
        except OSError as error:
            log.warning("W&B: no copy is made (%s); %s/metrics.jsonl has all lines", error, self.out)
            return None
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already; `check` says why
            child.stdin.write(json.dumps(order._asdict()).encode() + b"\n")
            child.stdin.flush()
        return child


def _run_id(path: Path) -> str:
    """The id in `path`, drawn when first asked for."""
    if not path.is_file():
        files.replace(path, f"{secrets.token_hex(4)}\n".encode())
    return path.read_text(encoding="utf-8").strip()


def _ended(child: "subprocess.Popen[bytes]") -> int:
    """End the input of `child`; its exit code. It ends by itself in time; one that does not is killed, with its children."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    try:
        code = child.wait(2 * OFFLINE_S + 5)
    except subprocess.TimeoutExpired:
        code = wandb_copy.FAILED
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # the library's own process, where it has not ended with ours
    child.wait()
    return code

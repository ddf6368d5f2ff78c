"""Chat templates rendered in a process that can be killed, kept between calls so that a turn costs no start."""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

WORKER = Path(__file__).with_name("template_worker.py")
START_S = 60.0
ANSWER_S = 30.0
"""Longest wait for an answer. The worker ends itself after 2 s of processor time; this is for one that does not run."""
MAX_ANSWER = 8_000_000
"""Bytes of an answer: 1 MB of text, each byte of it at most six in JSON."""


class Lost(Exception):
    """The worker ended or does not answer."""


class Renderer:
    """One worker, started at the first call and again whenever it was lost. Calls from several threads wait for one another."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text of a Jinja template as transformers renders chat templates. ValueError, one line, for a template that fails,
        refuses, loops, or takes more than 2 s, 512 MB or 1 MB of result."""
        request = json.dumps({"template": template, "variables": dict(variables)}).encode() + b"\n"
        with self._lock:
            try:
                reply = json.loads(self._ask(request))
            except Lost as lost:
                self.close()
                raise ValueError(f"the model's chat template failed: {lost}") from None
            if "error" in reply:
                self.close()  # what it had grown to is given back
                raise ValueError(f"the model's chat template failed: {' '.join(reply['error'].split())[:300]}")
        return str(reply["text"])

    def close(self) -> None:
        """End the worker; the next call starts another."""
        worker, self._worker = self._worker, None
        if worker is not None and self._owner == os.getpid():
            worker.kill()
            worker.communicate()

    def _ask(self, request: bytes) -> bytes:
        worker = self._started()
        assert worker.stdin is not None
        try:
            worker.stdin.write(request)
            worker.stdin.flush()
        except BrokenPipeError:
            pass  # read on: the answer says how it ended
        return self._line(worker, ANSWER_S)

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._worker is not None and self._owner == os.getpid() and self._worker.poll() is None:
            return self._worker
        self.close()
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # A session of its own: Ctrl-C, which ends an answer, is not for it. It ends when its standard input does.
        self._worker = subprocess.Popen([sys.executable, "-P", str(WORKER)], start_new_session=True, **pipes)
        self._owner = os.getpid()
        if self._line(self._worker, START_S) != b"ready":
            raise Lost("its process did not start")
        return self._worker

    def _line(self, worker: "subprocess.Popen[bytes]", seconds: float) -> bytes:
        """The next line that the worker writes. Lost where it ends first or is silent for too long."""
        assert worker.stdout is not None
        deadline, found = time.monotonic() + seconds, bytearray()
        while not found.endswith(b"\n"):
            ready, _, _ = select.select([worker.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Lost(f"its process did not answer within {seconds:.0f} s")
            part = os.read(worker.stdout.fileno(), 65536)
            if not part:
                raise Lost(_end(worker))
            found += part
            if len(found) > MAX_ANSWER:
                raise Lost("its process answered too much")
        return bytes(found[:-1])


def _end(worker: "subprocess.Popen[bytes]") -> str:
    """Why a worker ended."""
    _, said = worker.communicate()
    if worker.returncode == -signal.SIGPROF:
        return "it takes more than 2 s"
    last = said.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {worker.returncode}"]
    return f"its process ended: {last[0][:200]}"


_renderer = Renderer()
atexit.register(_renderer.close)
render = _renderer.render

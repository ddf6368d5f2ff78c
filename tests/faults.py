"""Faults at the n-th file operation, as an error or as the end of the process.

The end of a process is tried in children of a fork server: the imports are paid once, and pytest's own process, which has
threads, is never forked.
"""

import errno
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import files

Hook = Callable[[str, Path], None]


def fail_at(n: int, seen: list[str] | None = None, for_good: bool = False) -> Hook:
    """A `files.before_operation` that raises OSError at the n-th operation from now (1 is the next; 0 never), and `for_good` at
    all later ones too. `seen` collects the names of all operations asked for.
    """
    seen = [] if seen is None else seen

    def hook(operation: str, path: Path) -> None:
        seen.append(operation)
        if n and (len(seen) == n or (for_good and len(seen) > n)):
            raise OSError(errno.EIO, "injected", str(path))

    return hook


def do_at(n: int, act: Callable[[], None]) -> Hook:
    """A `files.before_operation` that calls `act` at the n-th operation; 0 never."""
    count = 0

    def hook(operation: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == n:
            act()

    return hook


def exit_at(n: int) -> Hook:
    """A `files.before_operation` that ends the process with status 9 at the n-th operation, as a kill would; 0 never."""
    return do_at(n, lambda: os._exit(9))


class ForkServer:
    """`run(function, ...)` calls a module-level function in a process of its own, and returns its exit status."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.faults"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        exit_at: int = 0,
        kill_after: float | None = None,
        kill_with: int = signal.SIGKILL,
    ) -> int:
        """0: came to its end; 1: raised (or the code of SystemExit); 9: ended at file operation `exit_at`; -N: killed by the
        signal N = `kill_with` after `kill_after` seconds.
        """
        assert self._process.stdin
        assert self._process.stdout
        texts = [str(argument) for argument in arguments]
        self._process.stdin.write(
            json.dumps([function.__module__, function.__name__, texts, exit_at, kill_after, int(kill_with)]) + "\n"
        )
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def ranks(self, n: int, module: str, *arguments: Any, limit: float = 300) -> "subprocess.CompletedProcess[str]":
        """`python -m module arguments...` on `n` ranks, which torchrun would start with all their imports. Where one fails, the
        others are ended; after `limit` seconds all are.
        """
        with tempfile.NamedTemporaryFile("r", errors="replace") as said:
            status = self.run(run_ranks, n, limit, said.name, module, *arguments)
            return subprocess.CompletedProcess([module, *map(str, arguments)], status, "", said.read())


def run_ranks(n: str, limit: str, said: str, module: str, *arguments: str) -> None:
    """For `ForkServer.ranks`: ends with the status of the first rank that failed, or 0. What they say goes to a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = set()
    for rank in range(int(n)):
        if child := os.fork():
            ranks.add(child)
            continue
        os.environ.update(group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        log = os.open(said, os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return  # to the end of a child of the server
    ends, failed = time.monotonic() + float(limit), 0
    while ranks:
        ended, status = os.waitpid(-1, os.WNOHANG)
        ranks.discard(ended)
        if time.monotonic() > ends or (ended and status and not failed):
            failed = failed or (os.waitstatus_to_exitcode(status) if ended else 124)
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        if not ended:
            time.sleep(0.01)
    raise SystemExit(failed)


def serve() -> None:
    for line in sys.stdin:
        module, name, arguments, n, kill_after, kill_with = json.loads(line)
        function = getattr(importlib.import_module(module), name)
        if function.__name__ == run_ranks.__name__:
            importlib.import_module(arguments[3])  # once, for all ranks of all calls
        child = os.fork()
        if child == 0:
            files.before_operation = exit_at(n)
            try:
                function(*arguments)
                os._exit(0)
            except SystemExit as exit_:
                os._exit(exit_.code if isinstance(exit_.code, int) else 1)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, kill_with)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()

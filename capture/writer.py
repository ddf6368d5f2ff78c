"""A thread that publishes files while the caller computes: bounded, waited for with a time limit, never silently dead."""

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from core.artifact import Builder
from core.files import Content

POLL_S = 0.1  # how often a waiting caller looks at the writer
DROP_S = 10.0  # how long to wait, after an error of the caller's, for the file being written


class FileToWrite(NamedTuple):
    """One file of an artifact."""

    name: str
    make: Callable[[], tuple[Content, int]]
    """Makes the content and says how many rows it holds; called in the writer's thread."""


class Writer:
    """Use as a context manager. Leaving it waits for all files; leaving it by an exception drops those not begun.

    An error in the thread is raised in the caller at its next `put`, `check` or exit. Where one file takes longer than
    `timeout_s`, the caller gets a TimeoutError that names it.
    """

    def __init__(self, builder: Builder, timeout_s: float, depth: int = 2) -> None:
        """`depth`: files that may wait, each held in memory."""
        self.bytes = 0
        """Written so far."""
        self._builder, self._timeout_s = builder, timeout_s
        self._queue: queue.Queue[FileToWrite | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._dropping = self._finished = False
        self._current, self._progress = "", time.monotonic()
        self._thread = threading.Thread(target=self._work, name="capture-writer", daemon=True)

    @property
    def waiting(self) -> int:
        """Files in the queue."""
        return self._queue.qsize()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, file: FileToWrite | None) -> None:
        """Hand a file over; waits while the queue is full."""
        began = time.monotonic()
        while True:
            self.check()
            try:
                self._queue.put(file, timeout=POLL_S)
                return
            except queue.Full:
                self._check_progress(began)

    def check(self) -> None:
        """Raise the writer's error, if it had one. OSError where the thread is gone without having said why."""
        if self._error is not None:
            raise self._error
        if not self._finished and not self._thread.is_alive():
            raise OSError(self._ended("it was killed"))

    def _ended(self, why: str) -> str:
        return f"the writer ended at {self._current or 'its queue'}: {why}; the same command continues from here"

    def _check_progress(self, waiting_since: float) -> None:
        if time.monotonic() - max(waiting_since, self._progress) > self._timeout_s:
            raise TimeoutError(
                f"the writer made no progress on {self._current or 'its queue'} for {self._timeout_s:.0f} s; see to the disk: "
                "the same command continues from here"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._dropping = True
            self._thread.join(DROP_S)  # a daemon: a disk that hangs cannot keep the process alive
            return
        self.put(None)
        began = time.monotonic()
        while self._thread.is_alive():
            self._check_progress(began)
            self._thread.join(POLL_S)
        self.check()

    def _work(self) -> None:
        try:
            while not self._dropping:
                try:
                    file = self._queue.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if file is None:
                    self._finished = True
                    return
                self._current, self._progress = file.name, time.monotonic()
                content, rows = file.make()
                self.bytes += self._builder.publish(file.name, content, rows).bytes
                self._current, self._progress = "", time.monotonic()
        except Exception as error:  # whatever it is, it belongs to the caller, who raises it
            error.add_note(f"the writer ended at {self._current or 'its queue'}")
            self._error = error
        except BaseException as error:  # such as SystemExit, with which the caller would end as if all were written
            self._error = OSError(self._ended(type(error).__name__))

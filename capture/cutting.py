"""Documents into sentences, passages or one unit each, in one process or in several: the same units in the same order."""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, Protocol

from capture.passages import Passages
from capture.punkt import Lines, Splitter, load_splitter
from capture.sources import Document
from llama3 import load_tokenizer

Unit = Literal["sentence", "passage", "document"]

BATCH_CHARACTERS = 2**19
"""Text handed to a process at a time: half a second of Punkt, beside which sending it costs nothing."""
BATCHES_PER_PROCESS = 3
"""Batches that wait for a process, are in it, or wait for their turn: memory stays flat."""


class Cutter(Protocol):
    """Cuts a text into units. `hash` identifies how."""

    hash: str

    def units(self, text: str) -> Iterator[str]: ...


class Sentences:
    """Punkt's sentences."""

    def __init__(self, splitter: Splitter, lines: Lines) -> None:
        self._splitter, self._lines = splitter, lines
        self.hash = splitter.hash

    def units(self, text: str) -> Iterator[str]:
        return self._splitter.sentences(text, self._lines)


class Documents:
    """Each document as it stands, for sources that are cut already."""

    hash = ""  # there is nothing to tell apart

    def units(self, text: str) -> Iterator[str]:
        if unit := text.strip():
            yield unit


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How documents are cut; small, so that it travels to other processes."""

    unit: Unit
    punkt: Literal["builtin", "pretrained"]
    language: str
    lines: Lines
    tokens: int
    """Tokens of a passage."""
    tokenizer: str
    """Model whose tokens are counted."""

    def cutter(self) -> Cutter:
        if self.unit == "passage":
            return Passages(load_tokenizer(self.tokenizer), self.tokens)
        if self.unit == "document":
            return Documents()
        return Sentences(load_splitter(self.punkt, self.language), self.lines)


class Cut(NamedTuple):
    """A document with its units in order, as they stand in it."""

    document: Document
    units: list[str]


def units_of(cutter: Cutter, name: str, text: str) -> list[str]:
    """The units of one document. ValueError with its name, whatever fails."""
    try:
        return list(cutter.units(text))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"document {name} ({len(text):,} characters) cannot be cut: {reason}") from error


def cut(documents: Iterator[Document], how: Cutting, processes: int) -> Generator[Cut, None, None]:
    """The documents with their units, in order. OSError where a process was killed."""
    if processes == 1:
        cutter = how.cutter()
        for document in documents:
            yield Cut(document, units_of(cutter, document.name, document.text))
        return
    with closing(_Pool(how, processes)) as pool:
        waiting: deque[tuple[list[Document], Future[list[list[str]]]]] = deque()
        for batch in _batches(documents):
            waiting.append((batch, pool.submit([(document.name, document.text) for document in batch])))
            if len(waiting) == BATCHES_PER_PROCESS * processes:
                yield from _next(waiting)
        while waiting:
            yield from _next(waiting)


def _next(waiting: "deque[tuple[list[Document], Future[list[list[str]]]]]") -> Iterator[Cut]:
    batch, future = waiting.popleft()
    yield from map(Cut, batch, future.result())


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Pool:
    """Processes that cut (`capture.worker`), each driven by a thread of this one."""

    def __init__(self, how: Cutting, processes: int) -> None:
        command = [sys.executable, "-m", "capture.worker", str(os.getpid())]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": paths}}
        self._processes = [subprocess.Popen(command, **pipes) for _ in range(processes)]
        self._first_line = asdict(how)
        self._fresh = list(self._processes)
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="cutting")

    def submit(self, documents: list[tuple[str, str]]) -> "Future[list[list[str]]]":
        """The units of the documents, given by name and text, to come."""
        return self._threads.submit(self._cut, documents)

    def _cut(self, documents: list[tuple[str, str]]) -> list[list[str]]:
        process = self._idle.get()
        try:
            if process in self._fresh:
                self._fresh.remove(process)
                _send(process, self._first_line)
            _send(process, documents)
            line = process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        finally:
            self._idle.put(process)
        if not line.endswith(b"\n"):
            raise OSError(
                "a process that cuts the text ended (killed, out of memory?); lower --processes and give the same command again"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        units: list[list[str]] = answer["units"]
        return units

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
            process.stdout.close()  # type: ignore[union-attr]
            process.wait()


def _send(process: Any, value: Any) -> None:
    process.stdin.write(json.dumps(value).encode() + b"\n")
    process.stdin.flush()

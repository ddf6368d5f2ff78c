"""Documents into sentences, passages or one unit each, in one process or in several: the same units in the same order."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

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


def cut(documents: Iterator[Document], how: Cutting, processes: int) -> Generator[Cut, None, None]:
    """The documents with their units, in order. OSError where a process was killed."""
    if processes == 1:
        cutter = how.cutter()
        for document in documents:
            yield Cut(document, list(cutter.units(document.text)))
        return
    # Spawned, not forked: this process has threads (Arrow's, the model's).
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        waiting: deque[tuple[list[Document], Future[list[list[str]]]]] = deque()
        try:
            for batch in _batches(documents):
                waiting.append((batch, pool.submit(_cut_batch, how, [document.text for document in batch])))
                if len(waiting) == BATCHES_PER_PROCESS * processes:
                    yield from _next(waiting)
            while waiting:
                yield from _next(waiting)
        except BrokenProcessPool:
            raise OSError(
                "a process that cuts the text ended (killed, out of memory?); lower --processes and give the same command again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


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


@lru_cache(maxsize=1)
def _cutter(how: Cutting) -> Cutter:
    return how.cutter()


def _cut_batch(how: Cutting, texts: list[str]) -> list[list[str]]:
    """Runs in a process of the pool."""
    return [list(_cutter(how).units(text)) for text in texts]


def _end_with_parent() -> None:
    """A process of the pool waits for work for ever when its parent is killed; this thread ends it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

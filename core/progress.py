"""How far a stage has come: a bar on terminals, lines elsewhere, from rank 0."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from core.contention import Waiting
from core.runtime import Runtime
from core.terminal import printable

T = TypeVar("T")


class Progress:
    """A progress bar with rate and time left on rank 0; a log line every ten seconds where stderr is no terminal."""

    def __init__(self, label: str, total: int | None, unit: str, runtime: Runtime | None = None) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._shown = runtime is None or runtime.is_main
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=label, total=total, unit=unit, unit_scale=True, disable=not (self._shown and terminal), leave=False
        )
        self._logged = self._shown and not terminal
        self._began = self._spoke = time.monotonic()
        self._waiting, self._busy = Waiting(), dict[str, str]()
        self.done = 0

    def update(self, n: int, **notes: Any) -> None:
        """Count `n` more units; `notes` (name=value) are shown beside the rate, and whether others use the cores too."""
        self.done += n
        now = time.monotonic()
        if due := now - self._spoke > 10:
            self._spoke, self._busy = now, self._waiting.notes()
        notes = {name: printable(str(value)) for name, value in notes.items()} | self._busy
        self._bar.update(n)
        if notes:
            self._bar.set_postfix(notes, refresh=False)
        if self._logged and due:
            rate = self.done / (now - self._began)
            left = f", {max(self._total - self.done, 0) / rate:.0f} s left" if self._total and rate else ""
            of = f" of {self._total:,}" if self._total else ""
            extra = "".join(f", {name} {value}" for name, value in notes.items())
            logging.getLogger(self._label).info("%s%s %s, %.0f/s%s%s", f"{self.done:,}", of, self._unit, rate, left, extra)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()


def progress(items: Iterable[T], label: str, total: int | None, unit: str, runtime: Runtime | None = None) -> Iterator[T]:
    """Iterate over `items` with a progress bar."""
    with Progress(label, total, unit, runtime) as bar:
        for item in items:
            yield item
            bar.update(1)

"""Rows on their way to a GPU: those of the next step are read, pinned and copied while this one is at work.

Two batches are under way at most, each in pinned memory of its own. On a CPU rows are read when they are asked for.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Segments = list[tuple[int, int]]


class Loader:
    """What `read` returns for the segments asked for, on `device`."""

    def __init__(self, read: Callable[[Segments], Tensor], device: torch.device) -> None:
        self._read, self._device = read, device
        self._ahead: tuple[Segments, Future[Tensor]] | None = None
        if device.type == "cuda":
            self._worker = ThreadPoolExecutor(1)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def take(self, segments: Segments, following: Segments) -> Tensor:
        """The rows of `segments`; those of `following` are begun."""
        if self._device.type != "cuda":
            return self._read(segments).to(self._device)
        expected, future = self._ahead or ([], None)
        if future is None or expected != segments:
            future = self._worker.submit(self._fetch, segments)
        rows = future.result()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)  # nothing else is on it yet
        rows.record_stream(current)
        self._ahead = (following, self._worker.submit(self._fetch, following)) if following else None
        return rows

    def _fetch(self, segments: Segments) -> Tensor:
        with torch.cuda.stream(self._stream):
            return self._read(segments).pin_memory().to(self._device, non_blocking=True)

"""The order of rows, as a function of seed and sizes alone: whatever the number of ranks, and however often a run is cut.

Chunks of the corpus come in a random order, epoch after epoch; the rows that are learned from, one behind the other,
are the stream. It is cut into windows of a whole number of steps, and each window is shuffled.

Shapes: M rows of a window that fall to this rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core.runtime import unit_generator


class Place(NamedTuple):
    """A place in the stream: `offset` rows behind the beginning of the chunk with number `ordinal` in the order."""

    ordinal: int
    offset: int


class ChunkOrder:
    """Which chunk of the corpus is the n-th: every chunk once an epoch, in a random order of that epoch."""

    def __init__(self, n_chunks: int, seed: int) -> None:
        self._n_chunks, self._seed = n_chunks, seed
        self._epoch, self._order = -1, list[int]()

    def __getitem__(self, ordinal: int) -> int:
        epoch, within = divmod(ordinal, self._n_chunks)
        if epoch != self._epoch:
            generator = unit_generator(self._seed, "chunks of epoch", epoch)
            self._epoch, self._order = epoch, torch.randperm(self._n_chunks, generator=generator).tolist()
        return self._order[within]


class WindowRows(NamedTuple):
    """What a rank takes of one window, in the order of the stream and in that of the steps."""

    arrivals: Tensor
    """int64 [M], rising: places in the window, as the stream goes, of this rank's rows."""
    drawn: Tensor
    """int64 [M]: the n-th row that this rank draws is the one that arrived `drawn[n]`-th."""


@dataclass(frozen=True)
class Windows:
    """How the stream is cut: `n_steps` steps of `batch_size` rows in windows of `window_steps`; the last may be shorter."""

    batch_size: int
    n_steps: int
    window_steps: int
    seed: int

    @classmethod
    def holding(cls, buffer_rows: int, batch_size: int, n_steps: int, seed: int) -> "Windows":
        """Windows of as many whole steps as fit in `buffer_rows`. ValueError where there is room for none."""
        if buffer_rows < batch_size:
            raise ValueError(f"--buffer-rows {buffer_rows:,}: expected at least one batch of --batch-size {batch_size:,}")
        return cls(batch_size, n_steps, min(buffer_rows // batch_size, n_steps), seed)

    def steps(self, window: int) -> range:
        """The steps that draw from `window`."""
        first = window * self.window_steps
        return range(first, min(first + self.window_steps, self.n_steps))

    def rows(self, window: int) -> int:
        return len(self.steps(window)) * self.batch_size

    def share(self, rank: int, size: int) -> slice:
        """The rows of a step that fall to rank `rank` of `size`."""
        return slice(self.batch_size * rank // size, self.batch_size * (rank + 1) // size)

    def of_rank(self, window: int, rank: int, size: int) -> WindowRows:
        """The rows of `window` that fall to rank `rank` of the `size` that share out the rows of a step."""
        generator = unit_generator(self.seed, "window", window)
        shuffled = torch.randperm(self.rows(window), generator=generator).view(-1, self.batch_size)
        arrivals, order = shuffled[:, self.share(rank, size)].flatten().sort()
        drawn = torch.empty_like(order)
        drawn[order] = torch.arange(len(order))
        return WindowRows(arrivals, drawn)

"""Rows that wait to be drawn: those of one window, and in the slots that are drawn already, those of the next.

So the memory is that of one window, and the stream flows as steps are taken. Shapes: R slots, d width.
"""

import torch
from torch import Tensor


class Buffer:
    """`put` the rows of a window as they arrive, `begin` it when all are in, and `draw` them in its order."""

    def __init__(self, n_rows: int, width: int, dtype: torch.dtype, device: torch.device, pinned: bool = False) -> None:
        self._rows = torch.empty(n_rows, width, dtype=dtype, device=device, pin_memory=pinned)
        self.clear()

    def clear(self) -> None:
        """All slots are free."""
        self._slots = torch.arange(len(self._rows), device=self._rows.device)  # as they become free
        self._n_free, self._n_filled = len(self._rows), 0

    @property
    def room(self) -> int:
        """Rows of the next window that can be put."""
        return self._n_free - self._n_filled

    def put(self, x: Tensor) -> None:
        """The next rows [N, d] of the next window; N at most `room`."""
        assert len(x) <= self.room
        slots = self._slots[self._n_filled : self._n_filled + len(x)]
        self._rows.index_copy_(0, slots, x.to(self._rows.device))
        self._n_filled += len(x)

    def begin(self, drawn: Tensor) -> None:
        """Draw from the window whose rows are in: first the one that arrived `drawn[0]`-th, and so on."""
        assert len(drawn) == self._n_filled
        self._slots = self._slots[drawn.to(self._slots.device)]
        self._n_free = self._n_filled = 0

    def draw(self, n: int) -> Tensor:
        """A copy of the next `n` rows [n, d]; their slots are free."""
        assert self._n_free + n <= len(self._slots)
        slots = self._slots[self._n_free : self._n_free + n]
        self._n_free += n
        return self._rows[slots]

    def skip(self, n: int) -> None:
        """As if `n` rows had been drawn."""
        self._n_free += n

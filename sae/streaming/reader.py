"""The rows of one site, step by step, out of a buffer that chunks refill while training goes on.

Whatever the number of ranks, step t learns from the same rows: the place of every row in the
stream, and the step that it falls to, depend on the seed and the sizes alone. Shapes: d width.
"""

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from core.runtime import Comm
from sae.streaming.buffer import Buffer
from sae.streaming.order import Place, Windows

ORDINAL, OFFSET = "stream.ordinal", "stream.offset"  # in a checkpoint


class Piece(NamedTuple):
    """The rows [n, d] of one site that are learned from in the chunk with number `ordinal`."""

    ordinal: int
    x: Tensor


class Pump(Protocol):
    """Where pieces come from."""

    def fetch(self, site: str) -> None:
        """Give the reader of `site` its next pieces. All ranks call it at the same place."""

    def seek(self, site: str, ordinal: int) -> None:
        """Go on with this piece."""


class Storage(NamedTuple):
    """What a buffer is made of."""

    width: int
    dtype: torch.dtype
    device: torch.device
    """Where training takes the rows."""
    on_host: bool


class StreamReader:
    """`take(0)`, `take(1)` and so on; after `seek(step, ...)`, on from that step."""

    def __init__(self, site: str, pump: Pump, windows: Windows, data: Comm, storage: Storage) -> None:
        self.total_steps, self.site = windows.n_steps, site
        self._pump, self._windows, self._data, self._device = pump, windows, data, storage.device
        mine = windows.share(data.rank, data.size)
        self._n_mine = mine.stop - mine.start  # rows of a step
        place = torch.device("cpu") if storage.on_host else storage.device
        pinned = storage.on_host and storage.device.type == "cuda"
        n_rows = windows.window_steps * self._n_mine
        self._buffer = Buffer(n_rows, storage.width, storage.dtype, place, pinned)
        self._pieces: deque[Piece] = deque()
        self.seek(0, {})

    # what a trainer asks for ----------------------------------------------------------------------

    def rows_in(self, step: int) -> int:
        """Rows of step `step`, all ranks together."""
        return self._windows.batch_size

    def take(self, step: int) -> Tensor:
        """This rank's rows of `step` [n, d], on the device; steps come one after the other."""
        assert step == self._step, f"step {step} is asked for, {self._step} would be next"
        window = step // self._windows.window_steps
        if window == self._filling:
            self._begin(step - self._windows.steps(window).start)
        rows = self._buffer.draw(self._n_mine)
        self._step += 1
        drawn = (self._step - self._windows.steps(window).start) * self._windows.batch_size
        self._fill(min(drawn, self._windows.rows(self._filling)))
        if rows.device == self._device:
            return rows
        return rows.pin_memory().to(self._device, non_blocking=True)

    def position(self, step: int) -> dict[str, Tensor]:
        """What `seek` needs to go on with `step`, which is the next one."""
        place = self._starts[step // self._windows.window_steps]
        return {ORDINAL: torch.tensor(place.ordinal), OFFSET: torch.tensor(place.offset)}

    def seek(self, step: int, position: Mapping[str, Tensor]) -> None:
        """Go on with `step`: what its window holds is computed again, from its first chunk on."""
        start = Place(int(position.get(ORDINAL, 0)), int(position.get(OFFSET, 0)))
        self._step, self._first = step, start.ordinal
        self._starts = {step // self._windows.window_steps: start}
        self._pieces.clear()
        self._offset = start.offset  # rows of the first piece that were placed
        self._waiting = -start.offset  # rows of the pieces that were not
        self._buffer.clear()
        self._open(step // self._windows.window_steps)
        self._pump.seek(self.site, start.ordinal)

    # what the pump asks and gives -----------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether no further row is needed."""
        return self._filling * self._windows.window_steps >= self._windows.n_steps

    @property
    def surplus(self) -> int:
        """Rows, of all ranks together, that came before there was a slot for them."""
        return self._filled + self._waiting - self._wanted

    def give(self, piece: Piece) -> None:
        """Take the next piece; those before the place that was sought are passed over."""
        if piece.ordinal >= self._first:
            self._pieces.append(piece)
            self._waiting += len(piece.x)

    # the stream -----------------------------------------------------------------------------------

    def _open(self, window: int) -> None:
        """`window` is to be filled from now on."""
        self._filling = window
        self._filled = self._placed = 0  # rows of it that came by, and this rank's among them
        self._wanted = 0  # rows of it that there are slots for
        if not self.done:
            self._rows = self._windows.of_rank(window, self._data.rank, self._data.size)

    def _begin(self, skipped: int) -> None:
        """Get the rest of the window, and draw from it; its first steps may be `skipped`."""
        self._fill(self._windows.rows(self._filling))
        self._buffer.begin(self._rows.drawn)
        self._buffer.skip(skipped * self._n_mine)
        self._open(self._filling + 1)

    def _fill(self, wanted: int) -> None:
        """Have the first `wanted` rows of the window come by."""
        if self.done:
            return
        self._wanted = wanted
        self._place()
        while self._filled + self._waiting < wanted:
            self._pump.fetch(self.site)
            self._place()

    def _place(self) -> None:
        """Put this rank's rows into the buffer, as far as there is room."""
        n_rows = self._windows.rows(self._filling)
        while self._pieces and self._filled < n_rows:
            piece = self._pieces[0]
            n = min(len(piece.x) - self._offset, n_rows - self._filled)
            stop = int(torch.searchsorted(self._rows.arrivals, self._filled + n))
            last = min(stop, self._placed + self._buffer.room)
            if last < stop:  # up to the first row that finds none
                n = int(self._rows.arrivals[last]) - self._filled
            chosen = self._rows.arrivals[self._placed : last] - self._filled + self._offset
            self._buffer.put(piece.x[chosen.to(piece.x.device)])
            self._placed = last
            self._filled += n
            self._offset += n
            self._waiting -= n
            if passed := self._offset == len(piece.x):
                self._pieces.popleft()
                self._offset = 0
            if self._filled == n_rows:
                self._starts[self._filling + 1] = Place(piece.ordinal + passed, self._offset)
                self._starts.pop(self._filling - 2, None)
            if last < stop:
                return

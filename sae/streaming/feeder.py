"""Chunks of the corpus through the model, and the rows that are learned from to every rank.

A round is a chunk for each rank. On a GPU the passes of the next round run on a stream of their own
beside the training; on a CPU model and training take turns. Shapes: n rows, d width of a site.
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capture.chunks import CapturedChunk, CorpusChunks, StartedChunk, start_chunk
from core.runtime import Runtime
from sae.row_statistics import refuse_large
from sae.split import held_out
from sae.streaming.order import ChunkOrder
from sae.streaming.reader import Piece, StreamReader


class SiteRows(NamedTuple):
    """What a chunk has at one site, without what is left out."""

    train: Tensor
    """[n, d]."""
    norms: Tensor
    """[n], of these, on the CPU."""
    validation: Tensor
    """Of held-out documents, [m, d]."""


@dataclass
class Passes:
    """This rank's chunks through the model, and which of their rows are learned from."""

    chunks: CorpusChunks
    order: ChunkOrder
    validation_fraction: float
    seed: int
    max_norm_ratio: float
    limits: dict[str, float] = field(default_factory=dict)
    """The largest norm that is kept at each site."""

    def __post_init__(self) -> None:
        self._device = self.chunks.how.model.device
        self._ahead: tuple[tuple[int, Sequence[str]], Future[tuple[StartedChunk, Any]]] | None = None
        if self._device.type == "cuda":
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="passes")
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def limit(self, median: float) -> float:
        """The largest norm that is kept where the median norm is `median`."""
        return self.max_norm_ratio * median if self.max_norm_ratio and median else math.inf

    def get(self, ordinal: int, sites: Sequence[str]) -> CapturedChunk:
        """The rows of the chunk with number `ordinal`, where the model is. ValueError for NaN or Inf."""
        if self._device.type != "cuda":
            return self._start(ordinal, sites).result
        if self._ahead is None or self._ahead[0] != (ordinal, sites):
            self.begin(ordinal, sites)
        assert self._ahead is not None
        started, passed = self._ahead[1].result()
        self._ahead = None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(passed)
        for stored in started.rows.values():
            stored.activations.record_stream(current)
        return started.result

    def begin(self, ordinal: int, sites: Sequence[str]) -> None:
        """On a GPU, start with what `get` will be asked for next."""
        if self._device.type == "cuda":
            self._ahead = (ordinal, sites), self._worker.submit(self._on_stream, ordinal, sites)

    def _on_stream(self, ordinal: int, sites: Sequence[str]) -> tuple[StartedChunk, Any]:
        with torch.cuda.stream(self._stream):
            return self._start(ordinal, sites), self._stream.record_event()

    def _start(self, ordinal: int, sites: Sequence[str]) -> StartedChunk:
        how = replace(self.chunks.how, sites=sites)
        return start_chunk(how, self.chunks.tokens(self.order[ordinal]), to_host=False)

    def rows(self, captured: CapturedChunk, site: str) -> SiteRows:
        """The rows at `site` that are learned from, and those that are held out."""
        tokens, norms, x = captured.tokens, captured.norms[site], captured.rows[site].floats()
        held = held_out(tokens.document_ids, self.validation_fraction, self.seed)
        held = held.repeat_interleave(tokens.lengths)
        kept = norms <= self.limits[site]
        refuse_large(norms[kept])
        train, validation = ((kept & part).nonzero()[:, 0] for part in (~held, held))
        return SiteRows(x[train.to(x.device)], norms[train], x[validation.to(x.device)])

    def no_rows(self, site: str) -> SiteRows:
        """As of a chunk without any."""
        how = self.chunks.how
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[how.storage]
        none = torch.empty(0, how.model.width(site), dtype=dtype, device=self._device)
        return SiteRows(none, torch.empty(0, dtype=torch.float64), none)


def of_all_ranks(x: Tensor, runtime: Runtime) -> list[Tensor]:
    """The rows `x` [n, d] of each rank, in order of rank; n may differ."""
    if runtime.world_size == 1:
        return [x]
    counts = runtime.comm.all_gather(torch.tensor(len(x), device=x.device)).tolist()
    padded = x.new_zeros(max(counts), x.shape[1])
    padded[: len(x)] = x
    every = runtime.comm.all_gather(padded.view(torch.uint8)).view(x.dtype)
    return [rows[:n] for rows, n in zip(every, counts, strict=True)]


class Feeder:
    """Gives the readers of all sites their pieces, from one pass as long as they keep together.

    Where a site leaves out more rows than another, it is ahead in the corpus for the same number of
    steps. The other's rows wait; once more than `most_waiting` do, the two go through the model apart.
    """

    def __init__(self, passes: Passes, runtime: Runtime, sites: Iterable[str], most_waiting: int) -> None:
        self._passes, self._runtime, self._most_waiting = passes, runtime, most_waiting
        self._next = dict.fromkeys(sites, 0)
        self._together = True
        self.readers: dict[str, StreamReader] = {}
        self.computed: dict[int, dict[str, Tensor]] = {}
        """By ordinal: rows that were computed for the statistics and are learned from now."""

    def seek(self, site: str, ordinal: int) -> None:
        self._next[site] = ordinal
        self._together = False

    def fetch(self, site: str) -> None:
        """The next pieces for `site`, and for the sites that are as far as it."""
        if not self._together:  # where runs are continued, sites may start a few chunks apart
            first = min(self._next.values())
            self._next = dict.fromkeys(self._next, first)
            self._together = True
            for ordinal in [ordinal for ordinal in self.computed if ordinal < first]:
                del self.computed[ordinal]
        start = self._next[site]
        sites = [other for other in self._next if other == site or self._keeps_up(other, start)]
        if computed := self.computed.pop(start, None):
            pieces = [{name: computed[name] for name in sites}]
        else:
            pieces = self._round(start, sites)
        for name in sites:
            for ordinal, rows in enumerate(pieces, start):
                self.readers[name].give(Piece(ordinal, rows[name]))
            self._next[name] += len(pieces)

    def _keeps_up(self, site: str, start: int) -> bool:
        reader = self.readers[site]
        together = self._next[site] == start and not reader.done
        return together and reader.surplus <= self._most_waiting

    def _round(self, start: int, sites: list[str]) -> list[dict[str, Tensor]]:
        """The rows of a chunk for each rank, from `start` on."""
        rank, world_size = self._runtime.rank, self._runtime.world_size
        captured = self._passes.get(start + rank, sites)
        self._passes.begin(start + world_size + rank, sites)
        pieces: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
        for site in sites:
            mine = self._passes.rows(captured, site).train
            for piece, rows in zip(pieces, of_all_ranks(mine, self._runtime), strict=True):
                piece[site] = rows
        return pieces

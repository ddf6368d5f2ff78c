"""The running top N of every latent, and its totals, in one pass over tokens.

Work goes with the number of activations above zero (at most k a token), never with latents times sentences: activations become
one pair for each (latent, sentence) in which the latent fires, pairs that cannot be among the top N are dropped at once, and
the others are merged into the table by sorting. The order is total (value down, sentence id up), so that neither the order of
the chunks nor the number of ranks changes the result.

Shapes: H activations above zero, P pairs, S sentences, A aggregations, N sentences kept for a latent and aggregation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.runtime import Runtime
from interpretability.records import HISTOGRAM_BINS, HISTOGRAM_FIRST_EXPONENT

MIN_PENDING = 1 << 18


class Ragged(NamedTuple):
    """Rows of different lengths: row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: Tensor
    offsets: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def take(self, rows: Tensor) -> "Ragged":
        """The rows named by `rows`, in that order."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        source = torch.repeat_interleave(self.offsets[rows] - offsets[:-1], lengths)
        return Ragged(self.values[source + torch.arange(len(source), device=source.device)], offsets)

    def to(self, device: torch.device | str) -> "Ragged":
        return Ragged(self.values.to(device), self.offsets.to(device))


def offsets_of(lengths: Tensor) -> Tensor:
    """0 and the running sum of `lengths`, (n + 1,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def cat_ragged(parts: Sequence[Ragged]) -> Ragged:
    return Ragged(torch.cat([part.values for part in parts]), offsets_of(torch.cat([part.lengths for part in parts])))


class Hits(NamedTuple):
    """Activations above zero of some whole sentences, in order of token."""

    latents: Tensor  # (H,) int64
    values: Tensor  # (H,) float32
    positions: Tensor  # (H,) int64, of the token in its sentence
    rows: Tensor  # (H,) int64, of the sentence in `Sentences`


class Pairs(NamedTuple):
    """(latent, sentence) pairs in which the latent fires."""

    latents: Tensor  # (P,) int64
    sentence_ids: Tensor  # (P,) int64
    scores: Tensor  # (A, P) float32, one for each aggregation
    positions: Ragged  # int32, of the tokens on which the latent fires
    values: Ragged  # float32, its activations there

    def take(self, rows: Tensor) -> "Pairs":
        return Pairs(
            self.latents[rows],
            self.sentence_ids[rows],
            self.scores[:, rows],
            self.positions.take(rows),
            self.values.take(rows),
        )

    def to(self, device: torch.device | str) -> "Pairs":
        latents, ids, scores = self.latents.to(device), self.sentence_ids.to(device), self.scores.to(device)
        return Pairs(latents, ids, scores, self.positions.to(device), self.values.to(device))


class Sentences(NamedTuple):
    """Sentences with what is needed to show them."""

    ids: Tensor  # (S,) int64
    documents: Tensor  # (S,) int64
    tokens: Ragged  # token ids, int32

    def take(self, rows: Tensor) -> "Sentences":
        return Sentences(self.ids[rows], self.documents[rows], self.tokens.take(rows))

    def used_by(self, pairs: Pairs) -> "Sentences":
        """Those that some pair refers to."""
        return self.take(torch.isin(self.ids, pairs.sentence_ids).nonzero().squeeze(1))

    def to(self, device: torch.device | str) -> "Sentences":
        return Sentences(self.ids.to(device), self.documents.to(device), self.tokens.to(device))


def cat_sentences(parts: Sequence[Sentences]) -> Sentences:
    """All sentences of `parts`, which hold none twice, by ascending id."""
    ids = torch.cat([part.ids for part in parts])
    every = Sentences(ids, torch.cat([part.documents for part in parts]), cat_ragged([part.tokens for part in parts]))
    return every.take(ids.argsort())


def cat_pairs(parts: Sequence[Pairs]) -> Pairs:
    return Pairs(
        torch.cat([part.latents for part in parts]),
        torch.cat([part.sentence_ids for part in parts]),
        torch.cat([part.scores for part in parts], dim=1),
        cat_ragged([part.positions for part in parts]),
        cat_ragged([part.values for part in parts]),
    )


def no_pairs(n_aggregations: int) -> Pairs:
    integers, offsets = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    scores = torch.zeros((n_aggregations, 0))
    return Pairs(integers, integers, scores, Ragged(integers.int(), offsets), Ragged(scores[0], offsets))


def pairs_of(hits: Hits, sentences: Sentences, aggregations: Sequence[str]) -> Pairs:
    """One pair for each sentence and latent that fires in it, by latent and then sentence, with its aggregates."""
    key = hits.latents * len(sentences.ids) + hits.rows
    key, order = key.sort(stable=True)  # stable: tokens of a pair stay in their order
    _, lengths = torch.unique_consecutive(key, return_counts=True)
    offsets = offsets_of(lengths)
    values, positions = hits.values[order], hits.positions[order]
    last_hit = offsets[1:] - 1
    latents, rows = hits.latents[order[last_hit]], hits.rows[order[last_hit]]
    n_tokens = sentences.tokens.lengths[rows]
    scores = []
    for aggregation in aggregations:
        if aggregation == "max":
            score = torch.segment_reduce(values, "max", lengths=lengths)
        elif aggregation == "mean":  # float64, so that the order of the sum cannot be seen in the float32 result
            score = (torch.segment_reduce(values.double(), "sum", lengths=lengths) / n_tokens).float()
        else:
            assert aggregation == "last", aggregation
            score = torch.where(positions[last_hit] == n_tokens - 1, values[last_hit], 0.0)
        scores.append(score)
    return Pairs(latents, sentences.ids[rows], torch.stack(scores), Ragged(positions.int(), offsets), Ragged(values, offsets))


def ranks(pairs: Pairs, aggregation: int) -> Tensor:
    """(P,) int64: 0 for the largest of its latent by (value down, sentence id up), and so on; P where the value is 0.

    `pairs` must be in ascending order of sentence id.
    """
    values = pairs.scores[aggregation]
    # The bits of a positive float32 rise with its value, so that one integer key sorts by latent and then by value, down.
    key = (pairs.latents << 32) + (0x7FFFFFFF - values.view(torch.int32).long())
    order = key.argsort(stable=True)
    latents = pairs.latents[order]
    starts = torch.searchsorted(latents, latents)  # first row of the same latent
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts
    return torch.where(values > 0, rank, len(order))


class TopTable:
    """For every latent and aggregation the `n` sentences with the largest value above 0, of all that was added.

    Memory goes with latents x aggregations x `n`, and what waits to be merged is never more than that again.
    """

    def __init__(self, n_latents: int, n: int, aggregations: Sequence[str], device: torch.device) -> None:
        self.n, self.aggregations = n, tuple(aggregations)
        self.pairs = no_pairs(len(self.aggregations))
        self.sentences: Sentences | None = None
        # The value of the N-th sentence, 0 while there are fewer.
        self._least = torch.zeros((len(self.aggregations), n_latents), device=device)
        self._pending: list[Pairs] = []
        self._pending_sentences: list[Sentences] = []
        self._n_pending = 0

    def add(self, pairs: Pairs, sentences: Sentences) -> None:
        """Take in pairs of `sentences` that were not added before."""
        hopeful = ((pairs.scores > 0) & (pairs.scores >= self._least[:, pairs.latents])).any(0)
        hopefuls = pairs.take(hopeful.nonzero().squeeze(1)).to("cpu")
        self._pending.append(hopefuls)
        self._pending_sentences.append(sentences.to("cpu").used_by(hopefuls))
        self._n_pending += len(hopefuls.latents)
        if self._n_pending > max(len(self.pairs.latents), MIN_PENDING):
            self.merge()

    def merge(self) -> None:
        """Bring what waits into the table. Needed once more after the last `add`."""
        pairs = cat_pairs([self.pairs, *self._pending])
        pairs = pairs.take(pairs.sentence_ids.argsort(stable=True))
        keep = torch.zeros_like(pairs.latents, dtype=torch.bool)
        for a in range(len(self.aggregations)):
            rank = ranks(pairs, a)
            keep |= rank < self.n
            last = rank == self.n - 1
            device = self._least.device
            self._least[a, pairs.latents[last].to(device)] = pairs.scores[a, last].to(device)
        self.pairs = pairs.take(keep.nonzero().squeeze(1))
        parts = ([self.sentences] if self.sentences else []) + self._pending_sentences
        if parts:
            self.sentences = cat_sentences(parts).used_by(self.pairs)
        self._pending, self._pending_sentences, self._n_pending = [], [], 0

    def between(self, first: int, last: int) -> tuple[Pairs, Sentences] | None:
        """The rows of latents `first` to `last - 1` with their sentences; None where there are none."""
        rows = ((self.pairs.latents >= first) & (self.pairs.latents < last)).nonzero().squeeze(1)
        if self.sentences is None or not len(rows):
            return None
        pairs = self.pairs.take(rows)
        return pairs, self.sentences.used_by(pairs)


class LatentTotals:
    """Counts, sums and maxima of every latent, all of them independent of the order in which they are added up.

    Sums are kept as integers: within a bin of the histogram all float32 are multiples of one unit.
    """

    def __init__(self, n_latents: int, device: torch.device) -> None:
        shape = (n_latents, HISTOGRAM_BINS)
        self.histogram = torch.zeros(shape, dtype=torch.int64, device=device)
        self.units = torch.zeros(shape, dtype=torch.int64, device=device)
        self.sentences = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.max = torch.zeros(n_latents, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        # 24 bits of mantissa: 2^(bin + first exponent) is 2^23 units.
        scales = [2.0 ** (23 - HISTOGRAM_FIRST_EXPONENT - i) for i in range(HISTOGRAM_BINS)]
        self._per_unit = torch.tensor(scales, dtype=torch.float64, device=device)

    def add(self, hits: Hits, pairs: Pairs, n_tokens: int) -> None:
        """Count the activations `hits` of `n_tokens` tokens, and the pairs made of them."""
        _, exponent = torch.frexp(hits.values)  # 2^(exponent - 1) <= value < 2^exponent
        bins = (exponent.long() - 1 - HISTOGRAM_FIRST_EXPONENT).clamp(0, HISTOGRAM_BINS - 1)
        where = hits.latents * HISTOGRAM_BINS + bins
        units = (hits.values.double() * self._per_unit[bins]).round().long()
        self.units.view(-1).index_add_(0, where, units)
        self.histogram.view(-1).index_add_(0, where, torch.ones_like(where))
        self.sentences.index_add_(0, pairs.latents, torch.ones_like(pairs.latents))
        self.max.scatter_reduce_(0, hits.latents, hits.values, "amax")
        self.tokens += n_tokens

    def combine(self, runtime: Runtime) -> None:
        """Make these the totals of all ranks."""
        for total in (self.histogram, self.units, self.sentences, self.tokens):
            runtime.comm.sum_(total)
        runtime.comm.max_(self.max)

    @property
    def firing(self) -> Tensor:
        """(n_latents,) int64: tokens on which each latent fires."""
        return self.histogram.sum(1)

    @property
    def mean(self) -> Tensor:
        """(n_latents,) float32, over the tokens on which a latent fires; 0 where there are none."""
        sums = (self.units.double() / self._per_unit).sum(1)
        return (sums / self.firing.clamp(min=1)).float()

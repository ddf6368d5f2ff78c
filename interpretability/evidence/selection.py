"""The running top N of every latent, a sample of each level of its activation, and its totals, in one pass over tokens.

Work goes with the number of activations above zero (at most k a token), never with latents times sentences: activations become
one pair for each (latent, sentence) in which the latent fires, pairs that cannot be kept are dropped at once, and the others
are merged into the table by sorting. What is kept follows from total orders (value down, sentence id up; hash up, sentence id
up), so that neither the order of the chunks nor the number of ranks changes the result.

Shapes: H activations above zero, P pairs, S sentences, A aggregations, N sentences kept for a latent and aggregation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.runtime import Runtime
from interpretability.records import HISTOGRAM_BINS, HISTOGRAM_FIRST_EXPONENT

MIN_PENDING = 1 << 20
PARTS = 32
"""Additions that are joined into one before they wait: a merge asks every part for every block."""
BLOCKS = 32
"""Parts of the table that are merged one after the other: what a merge holds beside the table is one of them."""
HASH_BITS = 31


class Ragged(NamedTuple):
    """Rows of different lengths: row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: Tensor
    offsets: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def take(self, rows: Tensor) -> "Ragged":
        """The rows named by `rows`, in that order."""
        source, offsets = gathered(self.offsets, rows)
        return Ragged(self.values[source], offsets)

    def to(self, device: torch.device | str) -> "Ragged":
        return Ragged(self.values.to(device), self.offsets.to(device))


def offsets_of(lengths: Tensor) -> Tensor:
    """0 and the running sum of `lengths`, (n + 1,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def gathered(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the elements of ragged `rows` stand, and the offsets that they have among themselves."""
    lengths = offsets.diff()[rows]
    taken = offsets_of(lengths)
    source = torch.repeat_interleave(offsets[rows] - taken[:-1], lengths)
    return source + torch.arange(len(source), device=source.device), taken


def cat_ragged(parts: Sequence[Ragged]) -> Ragged:
    return Ragged(torch.cat([part.values for part in parts]), offsets_of(torch.cat([part.lengths for part in parts])))


class Hits(NamedTuple):
    """Activations above zero of some whole sentences, in order of token."""

    latents: Tensor  # (H,) int64
    values: Tensor  # (H,) float32
    positions: Tensor  # (H,) int64, of the token in its sentence
    rows: Tensor  # (H,) int64, of the sentence in `Sentences`


class Pairs(NamedTuple):
    """(latent, sentence) pairs in which the latent fires; pair i fires on the tokens `offsets[i] : offsets[i + 1]`."""

    latents: Tensor  # (P,) int32
    sentence_ids: Tensor  # (P,) int64
    scores: Tensor  # (A, P) float32, one for each aggregation
    peaks: Tensor  # (P,) float32, the largest activation
    offsets: Tensor  # (P + 1,) int64
    positions: Tensor  # (H,) int32, of the tokens in their sentence
    values: Tensor  # (H,) float32, the activations there

    @property
    def n(self) -> int:
        return len(self.latents)

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def take(self, rows: Tensor) -> "Pairs":
        source, offsets = gathered(self.offsets, rows)
        return Pairs(
            self.latents[rows], self.sentence_ids[rows], self.scores[:, rows], self.peaks[rows], offsets,
            self.positions[source], self.values[source],
        )  # fmt: skip

    def slice(self, first: int, last: int) -> "Pairs":
        """Pairs `first` to `last - 1`, without copying any."""
        begin, end = int(self.offsets[first]), int(self.offsets[last])
        columns = self.latents[first:last], self.sentence_ids[first:last], self.scores[:, first:last], self.peaks[first:last]
        return Pairs(*columns, self.offsets[first : last + 1] - begin, self.positions[begin:end], self.values[begin:end])

    def to(self, device: torch.device | str) -> "Pairs":
        return Pairs(*(column.to(device) for column in self))


class Sentences(NamedTuple):
    """Sentences with what is needed to show them."""

    ids: Tensor  # (S,) int64
    documents: Tensor  # (S,) int64
    tokens: Ragged  # token ids, int32

    def take(self, rows: Tensor) -> "Sentences":
        return Sentences(self.ids[rows], self.documents[rows], self.tokens.take(rows))

    def used_by(self, pairs: Pairs) -> "Sentences":
        """Those that some pair refers to; `ids` must be ascending."""
        used = torch.zeros(len(self.ids), dtype=torch.bool)
        used[torch.searchsorted(self.ids, pairs.sentence_ids)] = True
        return self.take(used.nonzero().squeeze(1))

    def to(self, device: torch.device | str) -> "Sentences":
        return Sentences(self.ids.to(device), self.documents.to(device), self.tokens.to(device))


def cat_sentences(parts: Sequence[Sentences]) -> Sentences:
    """All sentences of `parts`, which hold none twice, by ascending id."""
    ids = torch.cat([part.ids for part in parts])
    every = Sentences(ids, torch.cat([part.documents for part in parts]), cat_ragged([part.tokens for part in parts]))
    return every.take(ids.argsort())


def cat_pairs(parts: Sequence[Pairs]) -> Pairs:
    latents, ids, scores, peaks, _, positions, values = zip(*parts, strict=True)
    return Pairs(
        torch.cat(latents), torch.cat(ids), torch.cat(scores, dim=1), torch.cat(peaks),
        offsets_of(torch.cat([part.lengths for part in parts])), torch.cat(positions), torch.cat(values),
    )  # fmt: skip


def no_pairs(n_aggregations: int) -> Pairs:
    integers, floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    none = integers.int()
    return Pairs(none, integers, floats.expand(n_aggregations, 0), floats, torch.zeros(1, dtype=torch.int64), none, floats)


def pairs_of(hits: Hits, sentences: Sentences, aggregations: Sequence[str]) -> Pairs:
    """One pair for each sentence and latent that fires in it, by latent and then sentence, with its aggregates."""
    # Hits come by sentence and token: an order that a stable sort keeps within a latent. Four bytes sort faster than eight.
    latents, order = hits.latents.int().sort(stable=True)
    rows, values, positions = hits.rows[order], hits.values[order], hits.positions[order]
    begins = torch.ones_like(latents, dtype=torch.bool)
    begins[1:] = (latents[1:] != latents[:-1]) | (rows[1:] != rows[:-1])
    first_hit = begins.nonzero().squeeze(1)
    offsets = torch.cat([first_hit, first_hit.new_full((1,), len(latents))])
    lengths, last_hit = offsets.diff(), offsets[1:] - 1
    latents, rows = latents[first_hit], rows[first_hit]
    n_tokens = sentences.tokens.lengths[rows]
    peaks = torch.segment_reduce(values, "max", lengths=lengths)
    scores = []
    for aggregation in aggregations:
        if aggregation == "max":
            score = peaks
        elif aggregation == "mean":  # float64, so that the order of the sum cannot be seen in the float32 result
            score = (torch.segment_reduce(values.double(), "sum", lengths=lengths) / n_tokens).float()
        else:
            assert aggregation == "last", aggregation
            score = torch.where(positions[last_hit] == n_tokens - 1, values[last_hit], 0.0)
        scores.append(score)
    return Pairs(latents, sentences.ids[rows], torch.stack(scores), peaks, offsets, positions.int(), values)


def bins_of(values: Tensor) -> Tensor:
    """The bin of the histogram in which each of `values` > 0 lies, int64."""
    _, exponent = torch.frexp(values)  # 2^(exponent - 1) <= value < 2^exponent
    return (exponent.long() - 1 - HISTOGRAM_FIRST_EXPONENT).clamp(0, HISTOGRAM_BINS - 1)


def mixed(state: Tensor | int, key: Tensor | int) -> Tensor:
    """`state` with `key` mixed into it, 64 bits as int64: SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    found = torch.as_tensor(state, dtype=torch.int64) + key - 7046029254386353131  # 2^64 / golden ratio, as int64
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        found ^= (found >> shift) & ((1 << (64 - shift)) - 1)
        found *= factor
    return found ^ ((found >> 31) & ((1 << 33) - 1))


def hashes(state: Tensor | int, key: Tensor | int) -> Tensor:
    """HASH_BITS bits of `key` mixed into `state`."""
    return mixed(state, key) & ((1 << HASH_BITS) - 1)


def level_states(n_latents: int, seed: int) -> Tensor:
    """(n_latents,) int64: what the hashes of a latent's pairs begin with."""
    return mixed(mixed(0, seed), torch.arange(n_latents))


def level_keys(latents: Tensor, sentence_ids: Tensor, peaks: Tensor, states: Tensor) -> Tensor:
    """(P,) int64 of pairs: latent and level (bin of the largest activation) in the upper bits, a hash of seed, latent and
    sentence below. `states` are those of `level_states`."""
    latents = latents.long()
    group = latents * HISTOGRAM_BINS + bins_of(peaks)
    return (group << HASH_BITS) + hashes(states[latents], sentence_ids)


def level_ranks(keys: Tensor) -> Tensor:
    """(P,) int64: place of each pair among those of its latent and level, by (hash, sentence id) up.

    `keys` are those of `level_keys`, in ascending order of sentence id.
    """
    return _places(keys.argsort(stable=True), keys >> HASH_BITS)


def ranks(latents: Tensor, values: Tensor) -> Tensor:
    """(P,) int64: 0 for the largest of its latent by (value down, sentence id up), and so on; P where the value is 0.

    `latents` and `values` are those of pairs in ascending order of sentence id.
    """
    # The bits of a positive float32 rise with its value, so that one integer key sorts by latent and then by value, down.
    key = (latents.long() << 32) + (0x7FFFFFFF - values.view(torch.int32).long())
    return torch.where(values > 0, _places(key.argsort(stable=True), latents), len(key))


def _places(order: Tensor, groups: Tensor) -> Tensor:
    """The place of each element within its group, where `order` sorts all by group first."""
    _, counts = torch.unique_consecutive(groups[order], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)  # first of the same group
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device) - starts
    return places


class TopTable:
    """For every latent and aggregation the `n` sentences with the largest value above 0, and of each level of its activation
    the
    `n_level` sentences of least hash, of all that was added.

    Memory goes with latents x (aggregations x `n` + levels x `n_level`), and with the distinct sentences among them. What waits
    to be merged is half of that, or MIN_PENDING pairs; a merge holds one of BLOCKS parts twice.
    """

    def __init__(
        self, n_latents: int, n: int, aggregations: Sequence[str], device: torch.device, n_level: int = 0, seed: int = 0
    ) -> None:
        self.n, self.aggregations, self.n_level = n, tuple(aggregations), n_level
        self._states = level_states(n_latents, seed).to(device)
        self._edges = torch.tensor([n_latents * i // BLOCKS for i in range(BLOCKS + 1)], dtype=torch.int32)
        self.blocks = [no_pairs(len(self.aggregations)) for _ in range(BLOCKS)]
        self.sentences: Sentences | None = None
        # The value of the N-th sentence, 0 while there are fewer; of each level the key of the last, the highest while fewer.
        self._least = torch.zeros((len(self.aggregations), n_latents), device=device)
        groups = torch.arange(n_latents * HISTOGRAM_BINS, device=device)
        self._last_key = ((groups + 1) << HASH_BITS) - 1
        self._recent: list[Pairs] = []
        self._pending: list[Pairs] = []
        self._pending_sentences: list[Sentences] = []
        self._n_pending = 0

    def add(self, pairs: Pairs, sentences: Sentences) -> None:
        """Take in pairs of `sentences` that were not added before, by latent."""
        latents = pairs.latents.long()
        hopeful = ((pairs.scores > 0) & (pairs.scores >= self._least[:, latents])).any(0)
        if self.n_level:
            keys = self.level_keys(pairs)
            hopeful |= keys <= self._last_key[keys >> HASH_BITS]
        hopefuls = pairs.take(hopeful.nonzero().squeeze(1)).to("cpu")
        self._recent.append(hopefuls)
        self._pending_sentences.append(sentences.to("cpu").used_by(hopefuls))
        self._n_pending += hopefuls.n
        if len(self._recent) == PARTS:
            joined = cat_pairs(self._recent)
            self._pending.append(joined.take(joined.latents.argsort(stable=True)))
            self._recent = []
        if self._n_pending > max(sum(block.n for block in self.blocks) // 2, MIN_PENDING):
            self.merge()

    def merge(self) -> None:
        """Bring what waits into the table. Needed once more after the last `add`."""
        parts = [*self._pending, *self._recent]
        cuts = [torch.searchsorted(part.latents, self._edges).tolist() for part in parts]
        for i, block in enumerate(self.blocks):
            waiting = [part.slice(cut[i], cut[i + 1]) for part, cut in zip(parts, cuts, strict=True)]
            if any(part.n for part in waiting):
                self.blocks[i] = self._kept(cat_pairs([block, *waiting]))
        if known := ([self.sentences] if self.sentences else []) + self._pending_sentences:
            every = cat_sentences(known)
            used = torch.zeros(len(every.ids), dtype=torch.bool)
            for block in self.blocks:
                used[torch.searchsorted(every.ids, block.sentence_ids)] = True
            self.sentences = every.take(used.nonzero().squeeze(1))
        self._recent, self._pending, self._pending_sentences, self._n_pending = [], [], [], 0

    def _kept(self, pairs: Pairs) -> Pairs:
        """Those of `pairs` that are among the top N or the sample of some level; remembers what it takes to be so."""
        order = pairs.sentence_ids.argsort(stable=True)
        latents = pairs.latents[order]
        keep = torch.zeros(pairs.n, dtype=torch.bool)
        device = self._least.device
        for a, scores in enumerate(pairs.scores):
            values = scores[order]
            rank = ranks(latents, values)
            keep |= rank < self.n
            last = rank == self.n - 1
            self._least[a, latents[last].long().to(device)] = values[last].to(device)
        if self.n_level:
            keys = self.level_keys(pairs)[order]
            rank = level_ranks(keys)
            keep |= rank < self.n_level
            lasts = keys[rank == self.n_level - 1].to(device)
            self._last_key[lasts >> HASH_BITS] = lasts
        return pairs.take(order[keep])

    def level_keys(self, pairs: Pairs) -> Tensor:
        """(P,) int64, as `level_keys` has them."""
        return level_keys(pairs.latents, pairs.sentence_ids, pairs.peaks, self._states.to(pairs.latents.device))

    def between(self, first: int, last: int) -> tuple[Pairs, Sentences] | None:
        """The rows of latents `first` to `last - 1` with their sentences; None where there are none."""
        parts = []
        for i, block in enumerate(self.blocks):
            if int(self._edges[i]) < last and first < int(self._edges[i + 1]):
                parts.append(block.take(((block.latents >= first) & (block.latents < last)).nonzero().squeeze(1)))
        if self.sentences is None or not any(part.n for part in parts):
            return None
        pairs = cat_pairs(parts)
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
        bins = bins_of(hits.values)
        where = hits.latents * HISTOGRAM_BINS + bins
        units = (hits.values.double() * self._per_unit[bins]).round().long()
        self.units.view(-1).index_add_(0, where, units)
        self.histogram.view(-1).index_add_(0, where, torch.ones_like(where))
        self.sentences += torch.bincount(pairs.latents, minlength=len(self.sentences))
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

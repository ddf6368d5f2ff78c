"""The embedded model's yardstick: an interpolated 5-gram model with modified Kneser-Ney smoothing.

Chen and Goodman 1999, section 3:

    p_n(w | h) = max(c(hw) - D(c(hw)), 0) / c(h) + backoff(h) p_(n-1)(w | h'),   h' = h without its first word,

where orders below the highest count the different words that precede `hw` in place of `hw` itself.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Order(NamedTuple):
    """One order n. An n-gram's key is (id of its first n - 1 words) * V + (its last word); ids are places among sorted keys."""

    keys: Ints
    discounted: Floats  # (c - D(c)) / c(h) for each n-gram
    backoff: Floats  # for each context, by the id of its n - 1 words


class NGram:
    """A model of order `order` over token ids below `n_vocab`, learnt from documents that do not see one another."""

    def __init__(self, documents: list[list[int]], n_vocab: int, pad: int, order: int = 5) -> None:
        self.n_vocab, self.pad, self.order = n_vocab, pad, order
        words, real = self._stream(documents)
        ids = np.zeros((order + 1, len(words)), dtype=np.int64)  # ids[n, i]: the n-gram that ends at i
        keys: list[Ints] = [np.zeros(1, dtype=np.int64)]
        for n in range(1, order + 1):
            prefix = np.concatenate(([0], ids[n - 1, :-1]))
            found, ids[n] = np.unique(prefix * n_vocab + words, return_inverse=True)
            keys.append(found)
        self._orders: list[_Order] = []
        for n in range(1, order + 1):
            if n == order:
                counts = np.bincount(ids[n][real], minlength=len(keys[n]))
            else:  # each (n + 1)-gram type counts once for its last n words
                _, first = np.unique(ids[n + 1][real], return_index=True)
                counts = np.bincount(ids[n][real][first], minlength=len(keys[n]))
            self._orders.append(_smoothed(keys[n], counts, n_vocab, len(keys[n - 1])))

    def _stream(self, documents: list[list[int]]) -> tuple[Ints, NDArray[np.bool_]]:
        """All documents in one row, each behind `order - 1` pads, and which words are real."""
        lead = [self.pad] * (self.order - 1)
        words = np.concatenate([np.array(lead + document, dtype=np.int64) for document in documents])
        real = np.concatenate([np.arange(len(document) + len(lead)) >= len(lead) for document in documents])
        return words, real

    def bits(self, documents: list[list[int]]) -> float:
        """Total bits of all tokens of `documents`."""
        words, real = self._stream(documents)
        probability = np.full(len(words), 1.0 / self.n_vocab)
        context = np.zeros(len(words), dtype=np.int64)  # id of the n - 1 words before each word, -1 where never seen
        for table in self._orders:
            key = np.where(context >= 0, context * self.n_vocab + words, -1)
            place = np.searchsorted(table.keys, key).clip(max=len(table.keys) - 1)
            seen = (table.keys[place] == key) & (context >= 0)
            known = context >= 0
            weight = np.where(known, table.backoff[context.clip(min=0)], 1.0)
            probability = np.where(seen, table.discounted[place], 0.0) + weight * probability
            context = np.concatenate(([-1], np.where(seen, place, -1)[:-1]))
        return float(-np.log2(probability[real]).sum())


def _smoothed(keys: Ints, counts: Ints, n_vocab: int, n_contexts: int) -> _Order:
    once, twice, thrice, four = np.bincount(counts.clip(max=5), minlength=6)[1:5].clip(min=1).astype(float)
    y = once / (once + 2 * twice)
    discount = np.array([0.0, 1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice])
    discount = discount.clip(min=(0.0, 0.1, 0.1, 0.1), max=(0.0, 1.0, 2.0, 3.0))  # never 0: unseen words need some mass
    context = keys // n_vocab
    off = discount[counts.clip(max=3)]
    total = np.bincount(context, weights=counts, minlength=n_contexts)
    removed = np.bincount(context, weights=off, minlength=n_contexts)
    safe = np.where(total > 0, total, 1.0)
    backoff = np.where(total > 0, removed / safe, 1.0)
    return _Order(keys, (counts - off) / safe[context], backoff)

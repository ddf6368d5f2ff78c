"""Texts seen before, by a 64-bit hash: eight bytes a text, so that a hundred million take less than a gigabyte."""

import numpy as np
import xxhash

RECENT = 2**18  # hashes kept in a set before they are merged into the sorted array


class Seen:
    """Remembers texts. Two different ones among n are taken for the same with a chance of n^2 / 2^65: 2e-5 for 25 million."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def add(self, text: str) -> bool:
        """Whether `text` is new."""
        key = xxhash.xxh3_64_intdigest(text.encode())
        if key in self._recent:
            return False
        value = np.uint64(key)
        place = int(self._sorted.searchsorted(value))
        if place < len(self._sorted) and self._sorted[place] == value:
            return False
        self._recent.add(key)
        if len(self._recent) == RECENT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            # Stable sorting of two rising runs is a merge.
            self._sorted = np.concatenate((self._sorted, np.sort(recent)))
            self._sorted.sort(kind="stable")
            self._recent.clear()
        return True

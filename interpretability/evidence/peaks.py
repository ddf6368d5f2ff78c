"""At which words a latent peaks. A latent that peaks at one word names that word; one that peaks at many may name a concept."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from interpretability.labels.words import distinct, unit_at

AROUND = 6
"""Tokens on each side of a peak among which its word is looked for."""


def variety(words: Sequence[str]) -> float:
    """How many different words there are among those at the peaks of n sentences: (different - 1) / (n - 1), 0 where n is 1.

    Forms of one word, such as soldier and soldiers, are no different words.
    """
    if len(words) < 2:
        return 0.0
    return (len(distinct(iter(words), len(words))) - 1) / (len(words) - 1)


def peak_word(tokens: Sequence[str], activations: Sequence[float]) -> str:
    """The word, number or sign, in lower case, in which the largest activation begins; empty for white space."""
    peak = int(np.argmax(np.asarray(activations)))
    first = max(0, peak - AROUND)
    return unit_at(tokens[first : peak + AROUND + 1], peak - first).lower()


def varieties(rows: pa.Table, aggregation: str) -> Iterator[tuple[int, float]]:
    """Each latent of `rows` (of `records.TOP_SCHEMA`, by latent) with the `variety` of its sentences of `aggregation`."""
    rows = rows.filter(pc.equal(rows["aggregation"], aggregation))
    latents, starts = np.unique(rows["latent"].to_numpy(), return_index=True)
    pairs = zip(rows["tokens"].to_pylist(), rows["activations"].to_pylist(), strict=True)
    words = [peak_word(tokens, activations) for tokens, activations in pairs]
    for latent, first, last in zip(latents.tolist(), starts, [*starts[1:], len(words)], strict=True):
        yield latent, variety(words[first:last])

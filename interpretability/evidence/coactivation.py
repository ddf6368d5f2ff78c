"""Sentences in which several latents fire: what features have in common that no one of them shows.

Shapes: M latents asked for.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from interpretability.records import LEVEL, TopSentences


class Together(NamedTuple):
    """A sentence in which all of some latents fire."""

    share: float
    """The smallest of `shares`: how strongly all of them fire there."""
    shares: tuple[float, ...]
    """Of each latent, in the order asked for, its largest activation in the sentence over its maximum in the corpus, 0 to 1."""
    sentence_id: int
    text: str


def together(top: TopSentences, latents: Sequence[int]) -> list[Together]:
    """Sentences of the folder in which all of `latents` (M) are known to fire, by `share`, then by sentence id.

    Known are the sentences stored for each latent (its top of every aggregation, its levels) and the background, a sample of
    the corpus with all that fires in it: what is found does hold, and a pair that is strong in the same sentences is found, but
    one that meets in weak places alone may be missed. ValueError where a latent does not exist or is named twice.
    """
    if len(set(latents)) < max(2, len(latents)):
        raise ValueError(f"--latents: expected two latents or more, each once; found {' '.join(map(str, latents))}")
    peaks: list[dict[int, float]] = []  # of each latent, its largest activation by sentence
    texts: dict[int, str] = {}
    sampled = _background(top, latents, texts)
    for latent in latents:
        found = dict(sampled[latent])
        for aggregation in (*top.aggregations, LEVEL):
            for row in top.levels(latent) if aggregation == LEVEL else top.sentences(latent, aggregation):
                found[row.sentence_id] = max(row.activations)
                texts[row.sentence_id] = row.text
        peaks.append(found)
    rows = []
    for sentence_id in set.intersection(*(set(found) for found in peaks)):
        shares = [min(1.0, found[sentence_id] / float(top.max_values[i])) for i, found in zip(latents, peaks, strict=True)]
        rows.append(Together(min(shares), tuple(shares), sentence_id, texts[sentence_id]))
    return sorted(rows, key=lambda row: (-row.share, row.sentence_id))


def _background(top: TopSentences, latents: Sequence[int], texts: dict[int, str]) -> Mapping[int, Mapping[int, float]]:
    """Of each latent, its largest activation in each sentence of the background in which it fires; adds to `texts`."""
    found: dict[int, dict[int, float]] = {latent: {} for latent in latents}
    for sentence in top.background():
        for latent in latents:
            values = sentence.activations[sentence.latents == latent]
            if len(values):
                found[latent][sentence.sentence_id] = float(values.max())
                texts[sentence.sentence_id] = sentence.text
    return found

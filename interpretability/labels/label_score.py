"""Scoring a label: how well the presence of what it names foretells whether the latent fires in a sentence."""

from collections.abc import Sequence
from typing import NamedTuple

from interpretability.labels.patterns import Pattern, Sample
from interpretability.labels.words import Units


class Score(NamedTuple):
    """Balanced accuracy of "the latent fires in a sentence if and only if the pattern is in it"."""

    score: float
    """Mean of the share of held-out sentences with the pattern, and of others without it; 0.5 at chance."""
    found: int
    held_out: int
    others_found: int
    others: int


def score(pattern: Pattern, held_out: Sequence[Units], sample: Sample, others: int) -> Score | None:
    """Score a pattern on sentences of the latent that it was not made from, and on `others`.

    `others` is the bit mask of the sentences of `sample` that are not the latent's; the latent may fire in some of them all the
    same, which lowers the score of a frequent one. None where there are no held-out or no other sentences.
    """
    if not held_out or not others:
        return None
    found, wrong = sum(map(pattern.present, held_out)), (sample.presence(pattern).mask & others).bit_count()
    n, n_others = len(held_out), others.bit_count()
    return Score((found / n + 1 - wrong / n_others) / 2, found, n, wrong, n_others)

"""How far two rankings agree, with an interval."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with its 95 % percentile interval, by bootstrap (Efron 1979)."""

    value: float
    low: float
    high: float


def ranks(values: Numbers) -> Numbers:
    """Places from 1 in rising order; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: Numbers = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return found


def spearman(a: Numbers, b: Numbers) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks. None where one side is constant or has fewer than 3 values."""
    x, y = ranks(a), ranks(b)
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman_interval(a: Numbers, b: Numbers, resamples: int, seed: int) -> Interval | None:
    """The same with its interval over pairs drawn again; resamples that are constant on one side are left out."""
    value = spearman(a, b)
    if value is None:
        return None
    draws = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    found = [r for r in (spearman(a[draw], b[draw]) for draw in draws) if r is not None]
    low, high = np.percentile(found or [value], [2.5, 97.5])
    return Interval(value, float(low), float(high))

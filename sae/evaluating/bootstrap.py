"""Intervals by the bootstrap over documents (Efron and Tibshirani 1993).

Tokens of one document are alike, so documents are drawn, not tokens. To bound memory they are first put into at most 100
groups; where there are more documents than that, whole groups are drawn, which are as independent as documents are.
Shapes: G groups, R resamples.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

GROUPS = 100
LEAST_GROUPS = 10
"""Fewer documents than this do not show how much documents differ."""
Z = 1.959964  # standard deviations of a normal variable to either side that hold 95 %
BLOCK = 25  # resamples at a time: their sums over the latents stay small

Sums = Mapping[str, Tensor]
Measures = Callable[[Sums], dict[str, Tensor]]
"""From sums with a leading dimension R to figures [R] each."""


def groups_of(documents: Tensor) -> Tensor:
    """The group of each sentence, int64 like `documents`, the document of each: documents in turn, at most `GROUPS` groups."""
    of_sentences: Tensor = torch.unique(documents, return_inverse=True)[1]
    return of_sentences % GROUPS


def whole(sums: Sums) -> dict[str, Tensor]:
    """The sums over all groups, as one resample."""
    return {name: value.sum(0, keepdim=True).double() for name, value in sums.items()}


def intervals(sums: Sums, measures: Measures, resamples: int, seed: int) -> dict[str, tuple[float, float] | None]:
    """95 % intervals of the figures of `measures`, of sums with G as their first dimension, from `resamples`.

    None where a resample lacks the figure, where the figure itself lies outside, as thresholds on few documents make it, and
    for all figures with fewer than `LEAST_GROUPS` groups.
    """
    filled = sums["tokens"] > 0
    n = int(filled.sum())
    values = measures(whole(sums))
    if n < LEAST_GROUPS or resamples < 2:
        return dict.fromkeys(values)
    sums = {name: value[filled].double() for name, value in sums.items()}
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    once = torch.ones(drawn.shape, dtype=torch.float64)
    weights = torch.zeros_like(once).scatter_add_(1, drawn, once)
    found = [measures({name: _weighed(part, value) for name, value in sums.items()}) for part in torch.split(weights, BLOCK)]
    return {name: interval(float(value), torch.cat([part[name] for part in found])) for name, value in values.items()}


def interval(value: float, resampled: Tensor) -> tuple[float, float] | None:
    """95 %, from a figure and its `resampled` values [R]: percentiles, shifted by how far their median lies from `value`.

    That is the bias-corrected interval of Efron and Tibshirani 1993, section 14.3, without acceleration.
    """
    if not bool(resampled.isfinite().all()) or not math.isfinite(value):
        return None
    below = ((resampled < value).double().mean() + (resampled <= value).double().mean()) / 2
    shift = 2 * torch.special.ndtri(below.clamp(1 / len(resampled), 1 - 1 / len(resampled)))
    levels = torch.special.ndtr(shift + torch.tensor((-Z, Z), dtype=torch.float64))
    low, high = resampled.double().quantile(levels).tolist()
    return (low, high) if low <= value <= high else None


def _weighed(weights: Tensor, value: Tensor) -> Tensor:
    """`weights` [R, G] times `value` [G, ...]: [R, ...]."""
    return (weights @ value.flatten(1)).view(-1, *value.shape[1:]) if value.dim() > 1 else weights @ value

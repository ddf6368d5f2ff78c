"""Intervals by the bootstrap over documents (Efron and Tibshirani 1993, chapter 13: percentiles).

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
    """The 2.5th and 97.5th percentile of each figure of `measures` over `resamples`, of sums with G as their first dimension.

    None where a resample lacks the figure, and for all figures with fewer than `LEAST_GROUPS` groups.
    """
    filled = sums["tokens"] > 0
    n = int(filled.sum())
    names = list(measures(whole(sums)))
    if n < LEAST_GROUPS or resamples < 2:
        return dict.fromkeys(names)
    sums = {name: value[filled].double() for name, value in sums.items()}
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    once = torch.ones(drawn.shape, dtype=torch.float64)
    weights = torch.zeros_like(once).scatter_add_(1, drawn, once)
    found = [measures({name: _weighed(part, value) for name, value in sums.items()}) for part in torch.split(weights, BLOCK)]
    levels = torch.tensor((0.025, 0.975), dtype=torch.float64)
    bounds = {name: torch.cat([part[name] for part in found]).double().quantile(levels).tolist() for name in names}
    return {name: (low, high) if math.isfinite(low + high) else None for name, (low, high) in bounds.items()}


def _weighed(weights: Tensor, value: Tensor) -> Tensor:
    """`weights` [R, G] times `value` [G, ...]: [R, ...]."""
    return (weights @ value.flatten(1)).view(-1, *value.shape[1:]) if value.dim() > 1 else weights @ value

"""Exact top-k of the latents' pre-activations, level by level.

Shapes: N rows, n latents, k kept, G latents in a group, m groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sae import fast

GROUPS = (64, 32, 16, 8)  # sizes tried, the largest first
SMALL = 2**17  # numbers in all; for fewer, as for a few tokens while a text is generated, the calls cost more than the looking
SPARE = 6  # groups per element kept: with fewer, the next level has too many candidates (measured, docs/performance.md)


def top_k(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `h` [N, n] in falling order: values [N, k] and indices [N, k] int64.

    Exact in values: an element of the top k lies in one of the k groups with the largest maxima, so it is enough to look there,
    and to look there in the same way. Where values tie, the choice depends on the input alone. NaN must be refused before: it
    would rank first.
    """
    kernels = fast.kernels_for(h)
    if kernels is not None:
        found: tuple[Tensor, Tensor] = kernels.top_k(h, k)
        return found
    n = h.shape[1]
    group = group_size(n, k)
    if group == 1 or h.numel() <= SMALL:
        return torch.topk(h, k)
    m = n // group
    grouped = h[:, : m * group].view(len(h), m, group)  # (N, m, G)
    best = torch.topk(grouped.amax(2), k, sorted=False).indices  # (N, k)
    candidates = _take_groups(grouped, best).flatten(1)  # (N, k * G)
    if m * group < n:
        candidates = torch.cat((candidates, h[:, m * group :]), 1)
    values, where = top_k(candidates, k)
    slot = where.div(group, rounding_mode="floor")
    inside = best.gather(1, slot.clamp_max(k - 1)) * group + where % group
    return values, torch.where(slot < k, inside, where - k * group + m * group)


def _take_groups(grouped: Tensor, chosen: Tensor) -> Tensor:
    """`out[i, j] = grouped[i, chosen[i, j]]`: [N, k, G] from [N, m, G] and [N, k]."""
    rows = torch.arange(len(grouped), device=grouped.device)[:, None]
    if grouped.is_contiguous():  # whole rows of a matrix: many times faster than a gather of single elements
        return F.embedding(chosen + rows * grouped.shape[1], grouped.flatten(0, 1))
    return grouped[rows, chosen]


def group_size(n: int, k: int) -> int:
    """The largest group that leaves `SPARE * k` maxima to choose from; 1 where none does."""
    return next((size for size in GROUPS if n // size >= SPARE * k), 1)

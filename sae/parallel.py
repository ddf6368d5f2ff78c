"""Latent parallel: what the ranks of a group that share rows, and own different latents, say to one another.

Each rank holds `n_latents / L` rows of `W_enc` and `W_dec`. A reconstruction is the sum of L partial ones; everything computed
from that sum is the same on all of them (the pair of conjugate functions of Megatron-LM, arXiv:1909.08053, section 3).
Shapes: N rows, n latents of this rank, L ranks in the group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.runtime import Comm
from sae.topk import top_k


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Comm) -> Tensor:
        return group.sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Comm) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum_(g.clone()), None


def reduce_from_group(group: Comm, x: Tensor) -> Tensor:
    """Sum of the ranks' partial `x`. Its gradient, the same on all ranks, is that of each part."""
    return x if group.size == 1 else _Reduce.apply(x, group)  # type: ignore[no-untyped-call]


def copy_to_group(group: Comm, x: Tensor) -> Tensor:
    """`x`, which all ranks hold, on its way into what each computes alone: the gradients of all of them are summed."""
    return x if group.size == 1 else _Copy.apply(x, group)  # type: ignore[no-untyped-call]


def sharded_top_k(h: Tensor, k: int, group: Comm) -> tuple[Tensor, Tensor | None]:
    """This rank's share of the k largest of each row of `h`, whose columns are spread over the ranks.

    Returns indices [N, K] into this rank's columns, K <= k, and which of them are among the k: bool [N, K], None for all. Only
    values travel: N * k of each rank. Ties go to the lower rank, which holds the lower latents.
    """
    if group.size == 1:
        return top_k(h, k)[1], None
    values, indices = top_k(h, min(k, h.shape[1])) if h.shape[1] else (h, torch.empty_like(h, dtype=torch.long))
    own = values.shape[1]
    every = group.all_gather(F.pad(values, (0, k - own), value=float("-inf")))  # (L, N, k)
    joined = every.transpose(0, 1).flatten(1)  # (N, L * k), each rank's in falling order, lower ranks first
    order = joined.argsort(dim=1, descending=True, stable=True)[:, :k]
    chosen = torch.zeros_like(joined, dtype=torch.bool).scatter_(1, order, True)
    kept = chosen.view(len(h), group.size, k)[:, group.rank, :own]
    width = int(kept.any(0).sum())  # what is kept stands in front
    if width == 0:  # the sparse products want a column
        return indices.new_zeros(len(h), 1), kept.new_zeros(len(h), 1)
    return indices[:, :width], kept[:, :width]


def global_batch_top_k(h: Tensor, k: int, data: Comm, latent: Comm) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of the `k * rows` largest positive values of `h`, over the rows and latents of all ranks.

    Returns indices [N, K], which of them are kept, bool [N, K], and the smallest value kept (0 where all positive ones are).
    Exact: the candidates are the K largest of each row, and K doubles while a row might hold more.
    """
    n = h.shape[1]
    n_rows = data.sum_(torch.tensor(len(h), device=h.device))
    budget = k * int(n_rows)
    width = min(2 * k, n)
    while True:
        values, indices = top_k(h, width)
        pool = values.flatten().clamp_min(0)
        pool = pool.topk(min(budget, len(pool))).values
        pool = F.pad(pool, (0, budget - len(pool)))
        pool = data.all_gather(latent.all_gather(pool)).flatten()
        threshold = pool.topk(budget).values[-1] if budget else pool.new_zeros(())
        cut_short = width < n and bool(((values[:, -1] >= threshold) & (values[:, -1] > 0)).any())
        more = torch.tensor(int(cut_short), device=h.device)
        if not int(data.max_(latent.max_(more))):
            kept = (values >= threshold) & (values > 0)
            used = max(1, int(kept.any(0).sum()))
            return indices[:, :used], kept[:, :used], threshold
        width = min(2 * width, n)

"""Products with a sparse matrix of latents, given as `values` and `indices`, and their gradients.

Everything here touches k of n latents per row; no `[N, n]` tensor exists, forward or backward.
Shapes: N rows, K entries per row, n latents, d model width.
"""

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae import fast

with warnings.catch_warnings():  # PyTorch says once per process that CSR tensors are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.empty(0, dtype=torch.long), torch.empty(0), (1, 1))


def bag(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """`out[i] = sum_j values[i, j] * weight[indices[i, j]]`: [N, d] from [N, K], [N, K] and [n, d]."""
    kernels = fast.kernels_for(weight)
    if kernels is not None:
        out: Tensor = kernels.bag(values, indices, weight)
        return out
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def sampled_product(g: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """`out[i, j] = g[i] . weight[indices[i, j]]`: [N, K] from [N, d], [n, d] and [N, K]."""
    kernels = fast.kernels_for(weight)
    if kernels is not None:
        out: Tensor = kernels.sampled_product(g, weight, indices)
        return out
    rows, entries = indices.shape
    starts = torch.arange(0, rows * entries + 1, entries, device=g.device)
    pattern = torch.sparse_csr_tensor(starts, indices.reshape(-1), g.new_zeros(rows * entries), (rows, weight.shape[0]))
    products: Tensor = torch.sparse.sampled_addmm(pattern, g, weight.T, beta=0.0).values()
    return products.view(rows, entries)


class Transposed(NamedTuple):
    """The entries of a sparse [N, n] matrix sorted by latent: row numbers and positions of the entries, and where each latent's
    begin."""

    rows: Tensor  # [N * K]
    order: Tensor  # [N * K], into the flattened values
    starts: Tensor  # [n + 1]


def transpose(indices: Tensor, n: int) -> Transposed:
    """Sort the entries of `indices` [N, K] by latent; those of one latent keep the order of their rows."""
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    starts = torch.zeros(n + 1, dtype=torch.long, device=flat.device)
    torch.cumsum(torch.bincount(flat, minlength=n), 0, out=starts[1:])
    return Transposed(order // indices.shape[1], order, starts)


def transposed_product(values: Tensor, by_latent: Transposed, dense: Tensor) -> Tensor:
    """`out[l] = sum of values[i, j] * dense[i] over indices[i, j] = l`: [n, d] from [N, K] and [N, d]."""
    weights = values.reshape(-1)[by_latent.order]
    return F.embedding_bag(
        by_latent.rows, dense, by_latent.starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def sums_by_latent(values: Tensor, by_latent: Transposed) -> Tensor:
    """`out[l] = sum of values[i, j] over indices[i, j] = l`: [n], in the order of the rows on every device."""
    return torch.segment_reduce(values.reshape(-1)[by_latent.order], "sum", offsets=by_latent.starts, initial=0.0)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return bag(values, indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W_dec = ctx.saved_tensors
        g = g.contiguous()
        g_values = sampled_product(g, W_dec, indices) if ctx.needs_input_grad[0] else None
        g_W_dec = transposed_product(values, transpose(indices, len(W_dec)), g) if ctx.needs_input_grad[2] else None
        return g_values, None, g_W_dec


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, b_pre: Tensor, W_enc: Tensor, b_enc: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        ctx.save_for_backward(z, b_pre, W_enc, indices)
        return selected.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, b_pre, W_enc, indices = ctx.saved_tensors
        g = g.contiguous()
        g_z = bag(g, indices, W_enc) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:4]):
            return g_z, None, None, None, None, None
        by_latent = transpose(indices, len(W_enc))
        g_b_enc = sums_by_latent(g, by_latent)
        g_W_enc = transposed_product(g, by_latent, z - b_pre)
        g_b_pre = -(g_b_enc @ W_enc)  # the same as minus the sum of g_z over the rows, without g_z
        return g_z, g_b_pre, g_W_enc, g_b_enc, None, None


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """`values @ W_dec[indices]`, [N, d], with sparse gradients for `values` [N, K] and `W_dec` [n, d]."""
    if not torch.is_grad_enabled():  # a Function's own cost is more than that of the sum for a single row
        return bag(values, indices, W_dec)
    out: Tensor = _Decode.apply(values, indices, W_dec)  # type: ignore[no-untyped-call]
    return out


def encode_at(parameters: tuple[Tensor, Tensor, Tensor], z: Tensor, indices: Tensor, h: Tensor) -> Tensor:
    """`h = W_enc (z - b_pre) + b_enc` at `indices` [N, K], with sparse gradients for `parameters` (b_pre, W_enc, b_enc) and z.

    `h` [N, n] was computed without gradients in order to choose the indices; it is not needed for the backward pass.
    """
    out: Tensor = _EncodeAt.apply(z, *parameters, indices, h.gather(1, indices))  # type: ignore[no-untyped-call]
    return out

"""Triton kernels for a GPU: top-k, sparse products, and the gradient of a latent's rows fused with projection, Adam and
renormalisation. Each has a twin in PyTorch (sae.topk, sae.sparse, sae.update), which CPUs use; sums are float32, or float64
where the operands are.

Imported only where tensors are on a GPU, or by tests under TRITON_INTERPRET=1.
Shapes: N rows, n latents, K entries per row, d model width, G latents in a group, E = N * K entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.gradients import DenseRows, Entries

GROUP = 32  # latents whose maximum stands for them in the first level of a top-k
CHUNK_GROUPS = 64  # groups that a program reduces
ENTRIES = 4  # rows gathered at a time, so that several loads are under way
UPDATE_ENTRIES = 2  # likewise where Adam needs registers too: two programs fit on a multiprocessor, with 4 only one
MOST_CANDIDATES = 2**15  # that one program ranks in registers


# top-k ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _group_max(h, maxima, n, m, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """maxima[row, j] = max of h[row, j * GROUP : (j + 1) * GROUP]."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    latent = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(h + row * n + latent, mask=latent < n, other=float("-inf"))
    tl.store(maxima + row * m + group, tl.max(values, 1), mask=group < m)


@triton.jit
def _select(h, groups, values, indices, n, count, K, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The K largest of `count` candidates of a row of `h`, in rising order of candidate; of equal ones the first.

    Candidate c is latent c, or with GROUP > 1 latent `groups[row, c // GROUP] * GROUP + c % GROUP`. The K-th largest is found
    bit by bit among keys, integers in the order of the floats.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    latent = c
    if GROUP > 1:
        group = tl.load(groups + row * (count // GROUP) + c // GROUP, mask=c < count, other=0)
        latent = group * GROUP + c % GROUP
    inside = (c < count) & (latent < n)
    value = tl.load(h + row * n + latent, mask=inside, other=float("-inf")).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(inside, (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648, -1)  # 0 to 2^32 - 1
    least = row * 0
    bit = least + 2147483648
    for _ in range(32):
        least = tl.where(tl.sum((key >= least + bit).to(tl.int32), 0) >= K, least + bit, least)
        bit = bit >> 1
    above, equal = key > least, key == least
    spare = K - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    place = row * K + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(values + place, value, mask=chosen)
    tl.store(indices + place, latent.to(tl.int64), mask=chosen)


def top_k(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As sae.topk.top_k, for float32 or bfloat16 `h` [N, n]; of equal values the one with the lower index is kept."""
    rows, n = h.shape
    h = h.contiguous()
    m = triton.cdiv(n, GROUP)
    two_levels = m >= 2 * k
    if rows == 0 or (max(m, k * GROUP) if two_levels else n) > MOST_CANDIDATES:
        return torch.topk(h, k)
    if two_levels:
        maxima = h.new_empty(rows, m)
        _group_max[(rows, triton.cdiv(m, CHUNK_GROUPS))](h, maxima, n, m, GROUP=GROUP, CHUNK=CHUNK_GROUPS)
        groups = _largest(maxima, maxima, m, k, 1)[1]
        values, indices = _largest(h, groups, k * GROUP, k, GROUP)
    else:
        values, indices = _largest(h, h, n, k, 1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def _largest(h: Tensor, groups: Tensor, count: int, k: int, group: int) -> tuple[Tensor, Tensor]:
    values, indices = h.new_empty(len(h), k), torch.empty(len(h), k, dtype=torch.int64, device=h.device)
    block = triton.next_power_of_2(count)
    _select[(len(h),)](
        h, groups, values, indices, h.shape[1], count, k, GROUP=group, BLOCK=block, num_warps=min(16, max(1, block // 512))
    )
    return values, indices


# sparse products -----------------------------------------------------------------------------------------------------


@triton.jit
def _gathered(dense, index, j, last, d, column, BLOCK: tl.constexpr, ENTRIES: tl.constexpr):
    """Rows `index[j + i]` of `dense` for i < ENTRIES, 0 from `last` on: [ENTRIES, BLOCK], and where they are real."""
    place = j + tl.arange(0, ENTRIES)
    real = place < last
    row = tl.load(index + place, mask=real, other=0).to(tl.int64)
    rows = tl.load(dense + row[:, None] * d + column[None, :], mask=real[:, None] & (column < d)[None, :], other=0.0)
    return rows, place, real


@triton.jit
def _bag(values, indices, weight, out, K, d, BLOCK: tl.constexpr, ENTRIES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], out.dtype.element_ty)
    first = row * K
    for j in range(first, first + K, ENTRIES):
        rows, place, real = _gathered(weight, indices, j, first + K, d, column, BLOCK, ENTRIES)
        factor = tl.load(values + place, mask=real, other=0.0).to(total.dtype)
        total += tl.sum(rows.to(total.dtype) * factor[:, None], 0)
    tl.store(out + row * d + column, total, mask=column < d)


@triton.jit
def _sampled(g, weight, indices, out, K, d, BLOCK: tl.constexpr, ENTRIES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    own = tl.load(g + row * d + column, mask=column < d, other=0.0).to(out.dtype.element_ty)
    first = row * K
    for j in range(first, first + K, ENTRIES):
        rows, place, real = _gathered(weight, indices, j, first + K, d, column, BLOCK, ENTRIES)
        tl.store(out + place, tl.sum(rows.to(own.dtype) * own[None, :], 1), mask=real)


def bag(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """As sae.sparse.bag; `weight` may be bfloat16, the result has the type of `values`."""
    rows, K = indices.shape
    out = values.new_empty(rows, weight.shape[1])
    if rows:
        _bag[(rows,)](values.contiguous(), indices.contiguous(), weight, out, K, weight.shape[1], **_blocks(weight))
    return out


def sampled_product(g: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """As sae.sparse.sampled_product; `weight` may be bfloat16, the result has the type of `g`."""
    rows, K = indices.shape
    out = g.new_empty(rows, K)
    if rows:
        _sampled[(rows,)](g.contiguous(), weight, indices.contiguous(), out, K, weight.shape[1], **_blocks(weight))
    return out


def _blocks(dense: Tensor, entries: int = ENTRIES) -> dict[str, int]:
    block = triton.next_power_of_2(dense.shape[1])
    return {"BLOCK": block, "ENTRIES": entries, "num_warps": min(16, max(1, block // 512))}


# gradient and update -------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(latent, weights, row, starts, dense, which, extra, d, column, acc_type: tl.constexpr, BLOCK: tl.constexpr,
              ENTRIES: tl.constexpr):  # fmt: skip
    """Of one latent's row: weights[e] * dense[row[e]] over its entries e, and row `which[latent]` of `extra` where that is not
    -1.
    """
    own = tl.load(which + latent).to(tl.int64)
    total = tl.load(extra + own * d + column, mask=column < tl.where(own < 0, 0, d), other=0.0).to(acc_type)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    for j in range(first, last, ENTRIES):
        rows, place, real = _gathered(dense, row, j, last, d, column, BLOCK, ENTRIES)
        factor = tl.load(weights + place, mask=real, other=0.0).to(acc_type)
        total += tl.sum(rows.to(acc_type) * factor[:, None], 0)
    return total


@triton.jit
def _adam(weight, mean, square, offset, inside, g, numbers):
    """New weight [BLOCK]; the moments are stored. `numbers` as in `update_rows`."""
    g = g * tl.load(numbers).to(g.dtype)
    m = tl.load(mean + offset, mask=inside, other=0.0)
    v = tl.load(square + offset, mask=inside, other=0.0)
    m = m + tl.load(numbers + 1).to(g.dtype) * (g - m)
    v = v + tl.load(numbers + 2).to(g.dtype) * (g * g - v)
    tl.store(mean + offset, m, mask=inside)
    tl.store(square + offset, v, mask=inside)
    w = tl.load(weight + offset, mask=inside, other=0.0) * tl.load(numbers + 3).to(g.dtype)
    root = tl.sqrt(v) * tl.load(numbers + 5).to(g.dtype) + tl.load(numbers + 6).to(g.dtype)
    return w - tl.load(numbers + 4).to(g.dtype) * m / root


@triton.jit
def _update(
    W_enc, W_enc_mean, W_enc_square, W_dec, W_dec_mean, W_dec_square,
    row, starts, values, g_values, centred, g_decoded,
    which, extra_enc, extra_dec, squares, numbers, d,
    UNIT: tl.constexpr, APPLY: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One latent: squares[latent] = squared norm of its gradients, projected where UNIT; with APPLY they act."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    offset = latent * d + column
    acc_type: tl.constexpr = W_dec.dtype.element_ty

    g = _gradient(latent, g_values, row, starts, centred, which, extra_enc, d, column, acc_type, BLOCK, ENTRIES)
    square = tl.sum(g * g, 0)
    if APPLY:
        w = _adam(W_enc, W_enc_mean, W_enc_square, offset, inside, g, numbers)
        tl.store(W_enc + offset, w, mask=inside)

    g = _gradient(latent, values, row, starts, g_decoded, which, extra_dec, d, column, acc_type, BLOCK, ENTRIES)
    if UNIT:
        w = tl.load(W_dec + offset, mask=inside, other=0.0)
        g = g - tl.sum(g * w, 0) * w
    tl.store(squares + latent, square + tl.sum(g * g, 0))
    if APPLY:
        w = _adam(W_dec, W_dec_mean, W_dec_square, offset, inside, g, numbers)
        if UNIT:
            w = w / tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), 0))
        tl.store(W_dec + offset, w, mask=inside)


def update_rows(
    enc: list[Tensor],
    dec: list[Tensor],
    parts: tuple[Entries, DenseRows | None],
    numbers: Tensor | None,
    unit: bool,
) -> Tensor:
    """Sum of the squared gradients of `W_enc` and `W_dec` []; with `numbers` the gradients act.

    `enc` and `dec` are a weight matrix and Adam's two moments of it, [n, d] each; gradients are the sum of `parts`; `unit` is
    `unit_decoder` of sae.update. `numbers` float64 [7]: factor of the gradient, 1 - beta1, 1 - beta2, factor of the weight,
    learning rate over the mean's correction, 1 over the root of the square's correction, epsilon.
    """
    (entries, extra), (n, d) = parts, dec[0].shape
    device = dec[0].device
    squares = dec[0].new_empty(n)
    which = torch.full((n,), -1, dtype=torch.int32, device=device)
    if extra is not None:
        which[extra.latents] = torch.arange(len(extra.latents), dtype=torch.int32, device=device)
    _update[(n,)](
        *enc, *dec,
        entries.row, entries.starts, entries.values, entries.g_values, entries.centred, entries.g_decoded,
        which, dec[0] if extra is None else extra.W_enc, dec[0] if extra is None else extra.W_dec,
        squares, squares if numbers is None else numbers, d,
        UNIT=unit, APPLY=numbers is not None, **_blocks(dec[0], UPDATE_ENTRIES),
    )  # fmt: skip
    return squares.double().sum()

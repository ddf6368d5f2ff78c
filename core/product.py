"""The dense product that the model and the SAE spend their time in, by the fastest kernel that PyTorch has for it."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from core.int8 import quantise

ONEDNN = torch._C._has_mkldnn and "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
"""Whether large float32 products go to oneDNN. PyTorch gives them to MKL, which runs at less than half the rate on AMD
processors (pytorch/builder issue 504; measured in docs/log.md)."""

FEW_ROWS = 64  # fewer are not rounded: a prompt or a decoding step has few sizes, and would pay most
MOST_INT8_ROWS = 8
LARGE_WEIGHT, LARGE_PRODUCT = 2**20, 2**20
"""Numbers in W, and multiplications in `x W^T`, from either of which on oneDNN is the faster: its call takes about 10 us more,
and for a single row of x MKL is good where W is small (measured in docs/log.md)."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x (..., n_in), W (n_out, n_in), b (n_out), result (..., n_out)."""
    large = x.numel() and (weight.numel() >= LARGE_WEIGHT or x.numel() * weight.shape[0] >= LARGE_PRODUCT)
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()  # oneDNN's kernel has no gradient
    if ONEDNN and large and not plain and x.dtype == torch.float32 and x.is_cpu:
        rows = x.reshape(-1, x.shape[-1])
        n = len(rows)
        if more := _rounded(n) - n:
            rows = F.pad(rows, (0, 0, 0, more))
        product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return cast(Tensor, product[:n].view(*x.shape[:-1], -1))
    return F.linear(x, weight, bias)


class Int8Weight(NamedTuple):
    """A weight W (n_out, n_in) in a quarter of its bytes; the error of a number is at most half its row's scale."""

    integers: Tensor
    """(n_out, n_in) int8."""
    scales: Tensor
    """(n_out,) float32."""
    ones: Tensor
    """(n_out,) bfloat16: what the kernel multiplies by, in its own type, which is too coarse for scales."""

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        integers, scales = quantise(weight.detach())
        return cls(integers, scales, torch.ones(len(integers), dtype=torch.bfloat16))


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    """`x W^T` for a few rows x (..., n_in) on a CPU, float32 (..., n_out): x and the sums are rounded to bfloat16.

    Its time is the reading of W; for more than MOST_INT8_ROWS rows `linear` is the faster.
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    product = torch.ops.aten._weight_int8pack_mm(rows, weight.integers, weight.ones)
    return cast(Tensor, (product * weight.scales).view(*x.shape[:-1], -1))


def _rounded(n: int) -> int:
    """`n` rows, or where they are many the next number with at most four leading binary digits.

    oneDNN compiles a kernel of some 0.4 MB for every number of rows and keeps it: batches of many sizes would fill the memory.
    """
    step = 1 << (n.bit_length() - 4) if n >= FEW_ROWS else 1
    return -(-n // step) * step

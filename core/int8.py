"""Rows as 8-bit integers with a float32 scale each.

Shapes: N rows, D width.
"""

import torch
from torch import Tensor

INT8_MAX = 127


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (N, D) as int8, and the scales (N,) float32 that give it back: the greatest absolute value of a row becomes 127.

    The error of a value is at most half a scale. A row of zeros has scale 0; one with NaN or Inf a scale that is not finite.
    No scale is subnormal, since many processors take such numbers for 0: rows below 127 times the smallest normal number get
    that as their scale. None is so large that 127 times it overflows.
    """
    x = x.float()
    largest = x.abs().amax(dim=1)
    scales = (largest / INT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    overflows = largest.isfinite() & (scales * INT8_MAX).isinf()
    scales = torch.where(overflows, torch.nextafter(scales, torch.zeros_like(scales)), scales)
    values = (x / scales[:, None]).round_().to(torch.int8)
    return values, torch.where(largest == 0, 0, scales)


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """The float32 rows (N, D) that `quantise` was given, as far as int8 holds them."""
    return values.float() * scales[:, None]

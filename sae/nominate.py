"""Two-stage encoding: a product in 8 bits nominates candidates for the top k, and only those are scored exactly.

Rows and weights are rounded to 8 bits with a scale for each row of theirs, so that `h = s_z s_w (q_z . q_w) + b_enc` up to
rounding. What it misses of the true top k is small but not nothing (docs/performance.md), so it is off by default.
Shapes: N rows, n latents, d model width, C candidates.
"""

import torch
from torch import Tensor

from sae.sparse import sampled_product
from sae.topk import top_k

LARGEST = 127  # of a signed 8-bit integer, symmetric


class Nominator:
    """The encoder `weight` [n, d], `bias` [n], rounded once for many rows; `candidates` are scored for each element kept."""

    def __init__(self, weight: Tensor, bias: Tensor, candidates: int) -> None:
        self.weight, self.bias, self.candidates = weight, bias, candidates
        rounded, scale = quantise(weight)
        self.rounded, self.scale = rounded.T, scale.T

    def top_k(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of the candidates of each of `rows` [N, d]: values, exact, in falling order, and indices [N, k]."""
        rounded, scale = quantise(rows)
        h = torch.mul(torch._int_mm(rounded, self.rounded), self.scale)  # (N, n), in units of each row's scale
        nominated = top_k(h.addcmul_(1 / scale, self.bias), min(self.candidates * k, h.shape[1]))[1]
        values, best = top_k(sampled_product(rows, self.weight, nominated).add_(self.bias[nominated]), k)
        return values, nominated.gather(1, best)


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` [N, d] as int8 [N, d] times a scale [N, 1]."""
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-20) / LARGEST  # also where a row is zero
    return (rows / scale).round_().to(torch.int8), scale

"""Rotary position embedding in Meta's convention: neighbouring pairs (2i, 2i + 1) of a head rotate together.

Shapes: B batch, T tokens, H heads, K head_dim.
"""

import math

import torch
from torch import Tensor

from llama3.args import RopeFactors, RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | RopeFactors | None) -> Tensor:
    """Angle per position of each pair, float32 `[K / 2]`: `theta ** (-2i / K)` (Su et al. 2021, section 3.2.2).

    With `RopeScaling`, low frequencies are divided by `factor`, high ones are kept and those between are interpolated
    (Llama 3.1, `apply_scaling` in meta-llama/llama-models). `RopeFactors` are what each one is divided by.
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if scaling is None:
        return freqs
    if isinstance(scaling, RopeFactors):
        return freqs / torch.tensor(scaling.divisors, device="cpu")
    wavelength = 2 * math.pi / freqs
    turns = scaling.original_max_position_embeddings / wavelength  # full turns within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)  # 0: divide by factor, 1: keep
    return (1 - smooth) * freqs / scaling.factor + smooth * freqs


def precompute_freqs_cis(head_dim: int, length: int, theta: float, scaling: RopeScaling | RopeFactors | None = None) -> Tensor:
    """Cosine and sine for each position and pair, float32 `[length, K / 2, 2]` (the real form of Meta's complex table)."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), frequencies(head_dim, theta, scaling))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def as_factors(freqs_cis: Tensor) -> Tensor:
    """The table (T, K/2, 2), or (B, T, K/2, 2) where rows have positions of their own, as `apply_rotary_emb` multiplies by it:
    complex, ([B,] T, 1, K/2), because that is one pass over memory; in compiled graphs real, ([B,] T, 1, K/2, 2), because
    Inductor generates no code for complex numbers and fuses the real form itself.
    """
    factors = freqs_cis.unsqueeze(-3)
    return factors if torch.compiler.is_compiling() else torch.view_as_complex(factors)


def apply_rotary_emb(x: Tensor, factors: Tensor) -> Tensor:
    """Turn each pair of `x` (B, T, H, K) by the angles of `as_factors`."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)  # (B, T, H, K/2, 2)
    if factors.is_complex():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * factors)
    else:
        (even, odd), (cos, sin) = pairs.unbind(-1), factors.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)

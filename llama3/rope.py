"""Rotary position embedding in Meta's convention: neighbouring pairs (2i, 2i + 1) of a head rotate together.

Shapes: B batch, T tokens, H heads, K head_dim.
"""

import math

import torch
from torch import Tensor

from llama3.args import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each pair, float32 `[K / 2]`: `theta ** (-2i / K)` (Su et al. 2021, section 3.2.2).

    With `scaling`, low frequencies are divided by `factor`, high ones are kept and those between are interpolated
    (Llama 3.1, `apply_scaling` in meta-llama/llama-models).
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return freqs
    wavelength = 2 * math.pi / freqs
    turns = scaling.original_max_position_embeddings / wavelength  # full turns within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)  # 0: divide by factor, 1: keep
    return (1 - smooth) * freqs / scaling.factor + smooth * freqs


def precompute_freqs_cis(head_dim: int, length: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Cosine and sine for each position and pair, float32 `[length, K / 2, 2]` (the real form of Meta's complex table)."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(head_dim, theta, scaling))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate `x` (B, T, H, K) by `freqs_cis` (T, K/2, 2), or (B, T, K/2, 2) where rows have positions of their own."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)  # (B, T, H, K/2, 2)
    turns = freqs_cis.unsqueeze(-3)  # ([B,] T, 1, K/2, 2)
    # A complex product is one pass over memory. Inductor generates no code for complex numbers, but fuses the real form itself.
    rotate = _rotate_real if torch.compiler.is_compiling() else _rotate_complex
    return rotate(pairs, turns).flatten(-2).type_as(x)


def _rotate_complex(pairs: Tensor, turns: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))


def _rotate_real(pairs: Tensor, turns: Tensor) -> Tensor:
    even, odd = pairs.unbind(-1)
    cos, sin = turns.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)

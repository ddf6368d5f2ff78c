"""What an SAE's weights alone say of its latents: encoder against decoder, and each latent beside its nearest.

Shapes: n latents, d model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core.norms import unit_rows
from core.product import linear
from sae.model import CPU_ELEMENTS, GPU_ELEMENTS, SAE


class WeightFigures(NamedTuple):
    """Per latent, float32 [n] on the CPU."""

    encoder_norm: Tensor
    encoder_bias: Tensor
    encoder_decoder_cosine: Tensor
    max_encoder_cosine: Tensor
    """The largest cosine with the encoder row of another latent."""
    max_decoder_cosine: Tensor


@torch.no_grad()
def weight_figures(sae: SAE) -> WeightFigures:
    """Of the encoder rows that the latents are computed with."""
    W_enc, b_enc = sae.encoder_rows(torch.arange(sae.cfg.n_latents, device=sae.W_enc.device))
    encoder, decoder = unit_rows(W_enc.float()), unit_rows(sae.W_dec.float())
    found = (
        torch.linalg.vector_norm(W_enc.float(), dim=1),
        b_enc.float(),
        torch.linalg.vecdot(encoder, decoder),
        max_cosines(encoder),
        max_cosines(decoder),
    )
    return WeightFigures(*(value.cpu() for value in found))


def max_cosines(rows: Tensor) -> Tensor:
    """The largest cosine of each of the unit `rows` [n, d] with another one, [n]; a single row has none (NaN)."""
    n = len(rows)
    if n == 1:
        return torch.full((1,), torch.nan)
    step = max(1, (CPU_ELEMENTS if rows.device.type == "cpu" else GPU_ELEMENTS) // n)
    found = []
    for start in range(0, n, step):
        cosines = linear(rows[start : start + step], rows)
        block = torch.arange(len(cosines), device=rows.device)
        cosines[block, start + block] = -torch.inf
        found.append(cosines.amax(1))
    return torch.cat(found)

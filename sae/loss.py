"""The training loss: reconstruction, and AuxK, which gives dead latents a gradient.

Shapes: N rows of this rank, n latents, d model width, K = k + min(k_aux, n_dead).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae.model import SAE
from sae.sparse import decode
from sae.topk import top_k


class Losses(NamedTuple):
    """Sums over the rows given and all d entries, so that ranks can add theirs, and which latents fired."""

    main: Tensor
    """sum (z - z_hat)^2, with gradients."""
    aux: Tensor
    """sum (e - e_hat)^2, with gradients; 0 where nothing is dead."""
    l0: Tensor
    """Active latents, summed over the rows."""
    fired: Tensor
    """Which latents were active in any row: uint8 [n], ready to be reduced across ranks."""


def default_k_aux(d_model: int) -> int:
    """The power of two nearest to d_model / 2 (Gao et al. 2024, A.2)."""
    return 1 << round(math.log2(max(1, d_model / 2)))


def aux_weight(n_dead: int, k_aux: int, coefficient: float) -> float:
    """Weight of mean((e - e_hat)^2) in the loss: full where at least `k_aux` latents are dead."""
    return coefficient * min(1.0, n_dead / k_aux)


def losses(sae: SAE, z: Tensor, dead: Tensor, k_aux: int) -> Losses:
    """Loss sums of normalised rows `z` [N, d]. `dead` [n_dead] int64 are the dead latents; none where AuxK is off.

    AuxK (Gao et al. 2024, A.2): the top `min(k_aux, n_dead)` dead latents of a row reconstruct its error `e = z - z_hat`, which
    is held fixed, without `b_pre`.
    """
    k = sae.cfg.k
    with torch.no_grad():
        h = sae.pre_activations(z)
        indices = top_k(h, k)[1]
        if len(dead):
            best = top_k(h.index_select(1, dead), min(k_aux, len(dead)))[1]
            indices = torch.cat((indices, dead[best]), 1)
    values = sae.encode_at(z, indices, h)
    z_hat = decode(values[:, :k], indices[:, :k], sae.W_dec) + sae.b_pre
    error = z - z_hat
    aux = z.new_zeros(())
    if len(dead):
        e_hat = decode(values[:, k:], indices[:, k:], sae.W_dec)
        aux = (error.detach() - e_hat).square().sum()
    active = values.detach()[:, :k] > 0
    fired = torch.zeros(sae.cfg.n_latents, dtype=torch.uint8, device=z.device)
    fired[indices[:, :k][active]] = 1
    return Losses(error.square().sum(), aux, active.sum(), fired)

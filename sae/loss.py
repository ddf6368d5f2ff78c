"""What training minimises: the settings of a step's loss and the sums that it leaves; sae.architectures has the losses.

Shapes: n latents of this rank.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from core.runtime import Mesh, Solo
from sae import fast
from sae.hyperparameters import Hyperparameters

ALONE = Mesh(Solo(), Solo())


class LossConfig(NamedTuple):
    """What the loss depends on besides weights and rows; numbers of latents count those of all ranks."""

    k: int
    k_aux: int = 0
    aux_coefficient: float = 0.0
    sparsity: float = 0.0
    """Weight of the penalty."""
    bandwidth: float = 0.05
    """Width of the window around a threshold in which `jumprelu` has a gradient for it."""
    products: torch.dtype | None = None
    """Type of what a hand-written step multiplies; None: that of the weights."""

    @classmethod
    def at(cls, config: Hyperparameters, step: int, d_model: int, device: torch.device) -> "LossConfig":
        """The loss of step `step` (from 0)."""
        in_bfloat16 = config.products == "bfloat16" or (config.products == "auto" and config.dtype == "float32")
        return cls(
            k=config.k_at(step),
            k_aux=config.aux_k or default_k_aux(d_model),
            aux_coefficient=config.aux_coefficient,
            sparsity=config.sparsity * min(1.0, (step + 1) / max(1, config.sparsity_warmup_steps)),
            bandwidth=config.jump_bandwidth,
            products=torch.bfloat16 if in_bfloat16 and device.type == "cuda" and fast.has_kernels() else None,
        )


class Losses(NamedTuple):
    """Sums over the rows given and all d entries, so that ranks can add theirs, and how often each latent fired."""

    objective: Tensor
    """What is differentiated, also a sum."""
    main: Tensor
    """sum (z - z_hat)^2."""
    aux: Tensor
    """Of the auxiliary reconstruction, unweighted; 0 where there is none."""
    penalty: Tensor
    """What the sparsity penalty adds up over this rank's latents, unweighted."""
    l0: Tensor
    """Active latents of this rank, summed over the rows."""
    fired: Tensor
    """Rows in which each latent was active: int32 [n], ready to be summed over ranks."""
    threshold: Tensor
    """The smallest value that was kept, where the batch has a budget; 0 otherwise."""


def default_k_aux(d_model: int) -> int:
    """The power of two nearest to d_model / 2 (Gao et al. 2024, A.2)."""
    return 1 << round(math.log2(max(1, d_model / 2)))


def aux_weight(n_dead: int, k_aux: int, coefficient: float) -> float:
    """Weight of mean((e - e_hat)^2) in the loss: full where at least `k_aux` latents are dead."""
    return coefficient * min(1.0, n_dead / k_aux)

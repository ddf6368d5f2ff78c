"""What architectures share whose sparsity is penalised: thousands of latents are active early on,
so products are dense.

Shapes: N rows of this rank, n latents of this rank, d model width.
"""

from typing import ClassVar

import torch
from torch import Tensor

from core.runtime import Mesh
from sae.hyperparameters import Hyperparameters
from sae.loss import LossConfig, Losses
from sae.memory import Share
from sae.model import SAE
from sae.parallel import copy_to_group, reduce_from_group


class DenseSAE(SAE):
    """Latents above a floor of their own are active; a penalty on them is weighed against the
    reconstruction. No AuxK.
    """

    sets_k = False
    dense_tensors: ClassVar[float]
    """[N, n] held at once, forward and backward; a mask of booleans is a quarter of one."""

    def begin_(self, config: Hyperparameters, generator: torch.Generator, first: int) -> None:
        self.initialise_(config.init, generator, first, config.n_latents, config.encoder_norm or 1.0)

    def product(self, z: Tensor, bias: Tensor, mesh: Mesh) -> Tensor:
        """`W_enc (z - b_pre) + bias` [N, n], with its graph."""
        return torch.addmm(bias, z - copy_to_group(mesh.latent, self.b_pre), self.W_enc.T)

    def weighed(self, z: Tensor, f: Tensor, penalty: Tensor, config: LossConfig, mesh: Mesh) -> Losses:
        """Sums for activations `f` [N, n]: `sum (z - z_hat)^2 + sparsity * d * penalty`.

        With means over d entries, as in our loss, `sparsity * d` is the weight that papers name.
        """
        main = (z - reduce_from_group(mesh.latent, f @ self.W_dec) - self.b_pre).square().sum()
        objective = main + config.sparsity * self.cfg.d_model * penalty
        active = f.detach() > 0
        fired = active.sum(0, dtype=torch.int32)
        return Losses(objective, main, z.new_zeros(()), penalty, fired.sum(), fired, z.new_zeros(()))

    @classmethod
    def step_bytes(cls, config: Hyperparameters, share: Share) -> int:
        """Pre-activations of all rows, or gradients, and a handful of [N, d]."""
        dense = share.rows * share.latents * config.number_bytes
        matrix = share.latents * share.d * config.number_bytes
        most = max(round(cls.dense_tensors * dense) + matrix, 2 * dense + 3 * matrix)
        return most + 4 * share.rows * share.d * config.number_bytes

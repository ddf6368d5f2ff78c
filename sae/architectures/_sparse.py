"""What architectures share that keep K of n latents per row: losses by sparse products, and AuxK,
which revives dead latents.

Shapes: N rows of this rank, n latents of this rank, d model width, K entries per row, G groups of
latents that reconstruct.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core.runtime import Mesh
from sae.hyperparameters import Hyperparameters
from sae.loss import ALONE, LossConfig, Losses, aux_weight, default_k_aux
from sae.memory import Share, choosing_bytes, entry_bytes, parameter_bytes
from sae.model import SAE
from sae.parallel import copy_to_group, reduce_from_group, sharded_top_k
from sae.sparse import decode, encode_at


class Choice(NamedTuple):
    """The latents that stay: indices [N, K], which of those do, bool [N, K] (None: all), and the
    smallest value kept [].
    """

    indices: Tensor
    kept: Tensor | None
    threshold: Tensor


class SparseSAE(SAE):
    """K of n latents per row, chosen without a gradient."""

    sets_k = True

    def choose(self, h: Tensor, k: int, mesh: Mesh) -> Choice:
        """This rank's share of the latents that training keeps: the k largest of each row of `h`
        [N, n].
        """
        return Choice(*sharded_top_k(h, k, mesh.latent), h.new_zeros(()))

    def decoded(self, values: Tensor, indices: Tensor, first: int) -> Tensor:
        """This rank's part of what each group of latents adds to the reconstruction: [G, N, d] from
        [N, K] each.
        """
        return decode(values, indices, self.W_dec)[None]

    def losses(
        self, z: Tensor, config: LossConfig, dead: Tensor | None = None, n_dead: int = 0, mesh: Mesh = ALONE, first: int = 0
    ) -> Losses:
        """`sum (z - z_hat)^2`, the mean over what the groups reconstruct one after the other, plus
        AuxK.

        AuxK (Gao et al. 2024, A.2): the top `min(k_aux, n_dead)` dead latents of a row reconstruct
        its error `e = z - z_hat`, which is held fixed, without `b_pre`; off where nothing is dead.
        """
        dead = z.new_zeros(0, dtype=torch.long) if dead is None else dead
        with_aux = n_dead > 0 and config.aux_coefficient > 0
        with torch.no_grad():
            h = self.pre_activations(z)
            indices, kept, threshold = self.choose(h, config.k, mesh)
            K = indices.shape[1]
            if with_aux:
                candidates = h.index_select(1, dead)
                chosen, kept_aux = sharded_top_k(candidates, min(config.k_aux, n_dead), mesh.latent)
                indices = torch.cat((indices, dead[chosen] if len(dead) else chosen), 1)
        values = encode_at((copy_to_group(mesh.latent, self.b_pre), self.W_enc, self.b_enc), z, indices, h).relu()
        main_values, main_indices = _masked(values[:, :K], kept), indices[:, :K]
        z_hat = reduce_from_group(mesh.latent, self.decoded(main_values, main_indices, first)).cumsum(0) + self.b_pre
        errors = (z - z_hat).square().sum((1, 2))  # (G,)
        aux, objective = z.new_zeros(()), errors.mean()
        if with_aux:
            error = (z - z_hat[-1]).detach()
            aux_values = _masked(values[:, K:], kept_aux)
            aux = (error - reduce_from_group(mesh.latent, decode(aux_values, indices[:, K:], self.W_dec))).square().sum()
            objective = objective + aux_weight(n_dead, config.k_aux, config.aux_coefficient) * aux
        active = main_values.detach() > 0
        fired = torch.zeros(len(self.W_enc), dtype=torch.int32, device=z.device)
        fired.scatter_add_(0, main_indices.flatten(), active.flatten().int())
        return Losses(objective, errors[-1], aux, z.new_zeros(()), active.sum(), fired, threshold)

    @classmethod
    def step_bytes(cls, config: Hyperparameters, share: Share) -> int:
        """By autograd: pre-activations and the choice among them, or gradients, and a handful of
        [N, d].
        """
        return cls.autograd_bytes(config, share, config.k)

    @staticmethod
    def autograd_bytes(config: Hyperparameters, share: Share, k: int, pooled: bool = False, vectors: int = 4) -> int:
        """`k` candidates per row, `pooled` where those of all rows are compared, and so many
        tensors [N, d].
        """
        n, d, rows, size = share.latents, share.d, share.rows, config.number_bytes
        k, k_aux = min(n, k), aux_latents(config, share)
        entries = entry_bytes(k + k_aux, config, share)
        choosing = rows * n * size * (2 if k_aux else 1) + choosing_bytes(rows, n, max(k, k_aux), size) + entries * pooled
        gradients = parameter_bytes(config, share) + n * d * size + entries
        return max(choosing, gradients) + vectors * rows * d * size


def aux_latents(config: Hyperparameters, share: Share) -> int:
    """Dead latents that reconstruct the error of a row, at most."""
    return min(share.latents, config.aux_k or default_k_aux(share.d)) if config.aux_coefficient else 0


def _masked(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values * kept

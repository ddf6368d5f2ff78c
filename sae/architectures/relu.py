"""ReLU with an L1 penalty (Templeton et al. 2024, Scaling Monosemanticity): `sum f_i ||W_dec_i||`."""

from typing import ClassVar

import torch
from torch import Tensor

from core.runtime import Mesh
from sae.architectures._dense import DenseSAE
from sae.loss import ALONE, LossConfig, Losses


class ReLU(DenseSAE):
    """All positive latents are active. Norms of decoder rows are free in training, since they stand
    in the penalty, and are folded into the encoder at the end.
    """

    unit_decoder = False
    exports: ClassVar = {"saelens": "standard", "dictionary_learning": "AutoEncoder"}
    dense_tensors = 4

    @property
    def floor(self) -> Tensor:
        return torch.zeros_like(self.b_enc)

    def losses(
        self, z: Tensor, config: LossConfig, dead: Tensor | None = None, n_dead: int = 0, mesh: Mesh = ALONE, first: int = 0
    ) -> Losses:
        f = self.product(z, self.b_enc, mesh).relu()
        penalty = (f * torch.linalg.vector_norm(self.W_dec, dim=1)).sum()
        return self.weighed(z, f, penalty, config, mesh)


ARCHITECTURE = ReLU

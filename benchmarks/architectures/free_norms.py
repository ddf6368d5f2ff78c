"""TopK whose decoder rows keep the norms that training gives them: SAELens' `rescale_acts_by_decoder_norm`.

A latent is `h_i ||W_dec_i||` and adds `h_i W_dec_i`, so the norms count in the choice of the k
largest, and no gradient is projected. They are folded into the encoder at the end of training.
"""

import torch
from torch import Tensor

from core.runtime import Mesh
from sae.architectures._sparse import Choice, SparseSAE


class FreeNorms(SparseSAE):
    selects_top_k = True
    unit_decoder = False

    def choose(self, h: Tensor, k: int, mesh: Mesh) -> Choice:
        return super().choose(h * torch.linalg.vector_norm(self.W_dec, dim=1), k, mesh)


ARCHITECTURE = FreeNorms

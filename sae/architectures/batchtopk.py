"""BatchTopK (Bussmann et al. 2024, arXiv:2412.06410): the `k * rows` largest values of a batch, so
k per row on average.
"""

from typing import ClassVar

import torch
from torch import Tensor

from core.runtime import Mesh
from sae.architectures._sparse import Choice, SparseSAE
from sae.config import SAEConfig
from sae.hyperparameters import Hyperparameters
from sae.loss import Losses
from sae.memory import Share
from sae.parallel import global_batch_top_k

THRESHOLD_DECAY = 0.9  # of the running mean of the smallest value kept
CANDIDATES = 8  # times k, of a row: they double until no row holds more


class BatchTopK(SparseSAE):
    """At inference a latent must exceed `threshold` [n_latents], which stands for the budget of the
    batches that it was trained on, so that no row depends on its neighbours. L0 is k on average in
    training, and about that at inference.
    """

    exports: ClassVar = {"dictionary_learning": "BatchTopKSAE"}
    exported_as = "jumprelu"
    threshold: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        self.register_buffer("threshold", torch.zeros(cfg.n_latents))

    @property
    def floor(self) -> Tensor:
        return self.threshold.clamp_min(0)

    def choose(self, h: Tensor, k: int, mesh: Mesh) -> Choice:
        return Choice(*global_batch_top_k(h, k, *mesh))

    def note_(self, part: Losses, step: int) -> None:
        self.threshold.lerp_(part.threshold, 1 - THRESHOLD_DECAY if step else 1.0)

    @classmethod
    def step_bytes(cls, config: Hyperparameters, share: Share) -> int:
        return cls.autograd_bytes(config, share, CANDIDATES * config.k, pooled=True)


ARCHITECTURE = BatchTopK

"""Matryoshka (Bussmann et al. 2025, arXiv:2503.17547): TopK whose first latents must reconstruct on
their own too.
"""

from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures._sparse import SparseSAE
from sae.hyperparameters import Hyperparameters
from sae.memory import Share
from sae.sparse import decode


class Matryoshka(SparseSAE):
    """At inference a TopK: at most k latents per row."""

    selects_top_k = True
    exports: ClassVar = {}
    exported_as = "topk"

    def decoded(self, values: Tensor, indices: Tensor, first: int) -> Tensor:
        ends = self.cfg.prefixes
        if not ends:
            return super().decoded(values, indices, first)
        group = torch.bucketize(indices + first, torch.tensor(ends, device=indices.device), right=True)
        return torch.stack([decode(values * (group == g), indices, self.W_dec) for g in range(len(ends))])

    @classmethod
    def check(cls, config: Hyperparameters) -> None:
        ends = prefixes(config)
        if ends[-1:] != (config.n_latents,) or ends[0] < config.k or list(ends) != sorted(set(ends)):
            raise ValueError(
                f"--matryoshka must be rising shares of --n-latents {config.n_latents} that end with 1, the first of "
                f"at least --k {config.k} latents; found {config.matryoshka}, which is {ends}"
            )

    @classmethod
    def config_of(cls, config: Hyperparameters) -> dict[str, tuple[int, ...]]:
        return {"prefixes": prefixes(config)}

    @classmethod
    def step_bytes(cls, config: Hyperparameters, share: Share) -> int:
        return cls.autograd_bytes(config, share, config.k, vectors=4 * max(1, len(config.matryoshka) // 2))


def prefixes(config: Hyperparameters) -> tuple[int, ...]:
    """The numbers of latents that `matryoshka` stands for."""
    return tuple(round(share * config.n_latents) for share in config.matryoshka)


ARCHITECTURE = Matryoshka

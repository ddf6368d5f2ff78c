"""What is compared in an evaluation: the SAEs, and baselines that show what their figures are worth.

Shapes: N tokens, d model width, k active latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sae.accumulator import Accumulator, Covariance
from sae.model import SAE, Latents, SAEConfig, best_encoder_norm

Reconstruct = Callable[[Tensor], tuple[Tensor, Latents | None]]
"""From rows x [N, d] to `x_hat` [N, d], with the active latents where there are any."""


class Contender(NamedTuple):
    """One column of the table."""

    name: str
    reconstruct: Reconstruct
    d: int
    n_latents: int = 0
    """0: it has none."""
    most_active: int = 0
    spliced: bool = False
    """Whether the model also runs on its reconstruction."""

    def sums(self, n_groups: int) -> Accumulator:
        return Accumulator.none(self.d, self.n_latents, self.most_active, n_groups)


def of_sae(name: str, sae: SAE) -> Contender:
    def reconstruct(x: Tensor) -> tuple[Tensor, Latents]:
        latents = sae.encode(x)
        return sae.decode(latents, sae.normalise(x)), latents

    cfg = sae.cfg
    most_active = cfg.k if sae.selects_top_k else cfg.n_latents
    return Contender(name, reconstruct, cfg.d_model, cfg.n_latents, most_active, spliced=True)


@dataclass(frozen=True)
class Baselines:
    """Fitted on other sentences than those evaluated."""

    mean: Tensor
    """Of x, [d], float32."""
    components: Tensor
    """As many principal components as the SAE has active latents, orthonormal columns [d, min(k, d)], float32."""
    random_sae: SAE
    """The SAE's shape, norm and b_pre with random rows."""

    def contenders(self, spliced: bool) -> Sequence[Contender]:
        """`spliced`: run the model on their reconstructions too."""
        d = len(self.mean)

        def pca(x: Tensor) -> tuple[Tensor, None]:
            return self.mean + ((x - self.mean) @ self.components) @ self.components.T, None

        named: dict[str, Reconstruct] = {
            f"PCA, {self.components.shape[1]} components": pca,
            "random SAE": lambda x: (self.random_sae(x), None),
            "mean": lambda x: (self.mean.expand_as(x), None),
            "identity": lambda x: (x, None),
        }
        # The model runs on the mean in any case, for the loss recovered.
        return [Contender(name, make, d, spliced=spliced and name != "mean") for name, make in named.items()]


def baselines(sae: SAE, fitted: Covariance, seed: int) -> Baselines:
    """Baselines for `sae`; `fitted` are the mean and covariance of x over the sentences to fit on."""
    mean, components = fitted.mean.to(sae.W_enc), fitted.components(sae.cfg.k).to(sae.W_enc)
    return Baselines(mean, components, random_sae(sae, seed))


@torch.no_grad()
def random_sae(sae: SAE, seed: int) -> SAE:
    """A TopK SAE of the same shape, norm and b_pre with unit rows in random directions in the decoder, the same in the encoder
    with the norm at which random rows reconstruct best.
    """
    cfg = sae.cfg
    shape = SAEConfig(d_model=cfg.d_model, n_latents=cfg.n_latents, k=cfg.k)
    made = SAE(replace(shape, norm=cfg.norm, scale=cfg.scale, norm_eps=cfg.norm_eps))
    norm = best_encoder_norm(cfg.n_latents, cfg.k, cfg.d_model)
    made.initialise_("tied", torch.Generator().manual_seed(seed), encoder_norm=norm)
    made = made.to(sae.W_enc).requires_grad_(False)
    made.b_pre.copy_(sae.b_pre)
    return made

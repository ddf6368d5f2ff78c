"""JumpReLU (Rajamanoharan et al. 2024, arXiv:2407.14435): each latent learns a threshold; how many
are active is penalised.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from core.runtime import Mesh
from sae.architectures._dense import DenseSAE
from sae.config import SAEConfig
from sae.hyperparameters import Hyperparameters
from sae.loss import ALONE, LossConfig, Losses


class JumpReLU(DenseSAE):
    """Latents above their `threshold` [n_latents] are active. Its gradient is estimated in a window
    around it.
    """

    exports: ClassVar = {"saelens": "jumprelu", "dictionary_learning": "JumpReluAutoEncoder"}
    dense_tensors = 6
    scalars = 2

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        self.threshold = nn.Parameter(torch.zeros(cfg.n_latents))

    @property
    def floor(self) -> Tensor:
        return self.threshold.clamp_min(0)

    @torch.no_grad()
    def begin_(self, config: Hyperparameters, generator: torch.Generator, first: int) -> None:
        super().begin_(config, generator, first)
        self.threshold.fill_(config.jump_threshold)

    @torch.no_grad()
    def constrain_(self) -> None:
        super().constrain_()
        self.threshold.clamp_(min=0)

    def losses(
        self, z: Tensor, config: LossConfig, dead: Tensor | None = None, n_dead: int = 0, mesh: Mesh = ALONE, first: int = 0
    ) -> Losses:
        h = self.product(z, self.b_enc, mesh)
        f = _JumpReLU.apply(h, self.threshold, config.bandwidth)  # type: ignore[no-untyped-call]
        penalty = _Step.apply(h, self.threshold, config.bandwidth).sum()  # type: ignore[no-untyped-call]
        return self.weighed(z, f, penalty, config, mesh)


def _window(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`K((h - threshold) / bandwidth) / bandwidth` with the rectangle kernel."""
    return ((h - threshold).abs() < bandwidth / 2).to(h.dtype) / bandwidth


class _JumpReLU(torch.autograd.Function):
    """`h` where above its threshold, else 0; the threshold's gradient is a kernel estimate
    (arXiv:2407.14435, eq. 11).
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return h * (h > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        h, threshold = ctx.saved_tensors
        return g * (h > threshold), -(g * threshold * _window(h, threshold, ctx.bandwidth)).sum(0), None


class _Step(torch.autograd.Function):
    """1 where `h` is above its threshold; no gradient for `h`, a kernel estimate for the threshold
    (eq. 12 there).
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return (h > threshold).to(h.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        h, threshold = ctx.saved_tensors
        return None, -(g * _window(h, threshold, ctx.bandwidth)).sum(0), None


ARCHITECTURE = JumpReLU

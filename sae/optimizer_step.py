"""How a step's gradients come about and act: by autograd, or by hand where the architecture has them written out.

Both leave sums over all ranks: each rank adds its rows, and what lies with its own latents stays there.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from core.runtime import Mesh
from sae.gradients import RowGradients
from sae.hyperparameters import Hyperparameters
from sae.loss import LossConfig, Losses
from sae.model import SAE
from sae.update import update_


@runtime_checkable
class HasRowGradients(Protocol):
    """An SAE whose architecture has its training step written out."""

    def row_gradients(
        self, z: Tensor, config: LossConfig, scale: float, dead: Tensor | None, n_dead: int, mesh: Mesh
    ) -> tuple[Losses, RowGradients]:
        """The sums of `losses`, and the gradients of `scale` times the objective, for normalised rows `z` [N, d]."""


class OptimizerStep(Protocol):
    """One step: `add` once or several times, then `finite`, then `update`."""

    def add(self, z: Tensor, loss_config: LossConfig, scale: float, dead: Tensor, n_dead: int) -> Losses:
        """Add the gradients of `scale` times the objective of normalised rows `z` [N, d]; returns the sums of `losses`."""

    def finite(self) -> Tensor:
        """Sum the gradients over the ranks; whether they are finite, bool []."""

    def update(self, lr: float) -> Tensor:
        """Let the gradients act, and forget them; returns their norm [], over all latents, before clipping."""


def optimizer_step(config: Hyperparameters, sae: SAE, optimizer: torch.optim.Adam, mesh: Mesh, first: int) -> OptimizerStep:
    """The fastest way for the architecture; `first` is the first latent of this rank."""
    if isinstance(sae, HasRowGradients):
        return ByHand(config, sae, optimizer, mesh)
    return ByAutograd(config, sae, optimizer, mesh, first)


class ByHand:
    """`row_gradients` and sae.update: no gradient of a weight matrix is ever whole in memory."""

    def __init__(self, config: Hyperparameters, sae: SAE, optimizer: torch.optim.Adam, mesh: Mesh) -> None:
        assert isinstance(sae, HasRowGradients)
        self.config, self.sae, self.optimizer, self.mesh = config, sae, optimizer, mesh
        self.row_gradients = sae.row_gradients  # such a check takes microseconds: once, not in each step
        self.gradients: RowGradients | None = None

    def add(self, z: Tensor, loss_config: LossConfig, scale: float, dead: Tensor, n_dead: int) -> Losses:
        part, gradients = self.row_gradients(z, loss_config, scale, dead, n_dead, self.mesh)
        self.gradients = gradients if self.gradients is None else self.gradients.plus(gradients)
        return part

    def finite(self) -> Tensor:
        assert self.gradients is not None
        return self.gradients.finite()

    def update(self, lr: float) -> Tensor:
        assert self.gradients is not None
        self.optimizer.param_groups[0]["lr"] = lr
        gradients, self.gradients = self.gradients, None
        return update_(self.sae, self.optimizer, gradients, self.config.clip_norm, self.sae.unit_decoder, self.mesh.latent)


class ByAutograd:
    """Gradients in `.grad`, then projection, clipping, Adam and renormalisation one after the other."""

    def __init__(self, config: Hyperparameters, sae: SAE, optimizer: torch.optim.Adam, mesh: Mesh, first: int) -> None:
        self.config, self.sae, self.optimizer, self.mesh, self.first = config, sae, optimizer, mesh, first

    def add(self, z: Tensor, loss_config: LossConfig, scale: float, dead: Tensor, n_dead: int) -> Losses:
        part = self.sae.losses(z, loss_config, dead, n_dead, self.mesh, self.first)
        (part.objective * scale).backward()  # type: ignore[no-untyped-call]
        return Losses(*(value.detach() for value in part))

    def finite(self) -> Tensor:
        return torch.stack([self.mesh.data.sum_(gradient).sum() for gradient in self._gradients().values()]).sum().isfinite()

    def update(self, lr: float) -> Tensor:
        config, sae = self.config, self.sae
        if sae.unit_decoder:
            sae.remove_parallel_gradient_()
        norm = self._norm()
        if config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(sae.parameters(), config.clip_norm, norm)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        sae.constrain_()
        return norm

    def _gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.sae.named_parameters() if parameter.grad is not None}

    def _norm(self) -> Tensor:
        """Ranks with different latents have the same `b_pre`, which counts once."""
        latent = self.mesh.latent
        squares = [
            torch.linalg.vector_norm(gradient).double().square() * (name != "b_pre" or latent.rank == 0)
            for name, gradient in self._gradients().items()
        ]
        return latent.sum_(torch.stack(squares).sum()).sqrt()

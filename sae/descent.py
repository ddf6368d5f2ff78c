"""How a step's gradients come about and act: by autograd for every architecture, by hand for topk.

Both leave sums over all ranks: each rank adds its rows, and what lies with its own latents stays there.
"""

from typing import Protocol

import torch
from torch import Tensor

from core.runtime import Mesh
from sae.hyperparameters import Hyperparameters
from sae.loss import Losses, Recipe, losses
from sae.model import SAE
from sae.step import RowGradients, topk_step
from sae.update import update_


class Descent(Protocol):
    """One step: `add` once or several times, then `finite`, then `update`."""

    def add(self, z: Tensor, recipe: Recipe, scale: float, dead: Tensor, n_dead: int) -> Losses:
        """Add the gradients of `scale` times the objective of normalised rows `z` [N, d]; returns the sums of `losses`."""

    def finite(self) -> Tensor:
        """Sum the gradients over the ranks; whether they are finite, bool []."""

    def update(self, lr: float) -> Tensor:
        """Let the gradients act, and forget them; returns their norm [], over all latents, before clipping."""


def descent(config: Hyperparameters, sae: SAE, optimizer: torch.optim.Adam, mesh: Mesh, first: int) -> Descent:
    """The fastest way for the architecture; `first` is the first latent of this rank."""
    if config.architecture == "topk":
        return ByHand(config, sae, optimizer, mesh)
    return ByAutograd(config, sae, optimizer, mesh, first)


class ByHand:
    """sae.step and sae.update: no gradient of a weight matrix is ever whole in memory."""

    def __init__(self, config: Hyperparameters, sae: SAE, optimizer: torch.optim.Adam, mesh: Mesh) -> None:
        self.config, self.sae, self.optimizer, self.mesh = config, sae, optimizer, mesh
        self.gradients: RowGradients | None = None

    def add(self, z: Tensor, recipe: Recipe, scale: float, dead: Tensor, n_dead: int) -> Losses:
        part, gradients = topk_step(self.sae, z, recipe, scale, dead, n_dead, self.mesh)
        self.gradients = gradients if self.gradients is None else self.gradients.plus(gradients)
        return part

    def finite(self) -> Tensor:
        assert self.gradients is not None
        return self.gradients.finite()

    def update(self, lr: float) -> Tensor:
        assert self.gradients is not None
        self.optimizer.param_groups[0]["lr"] = lr
        gradients, self.gradients = self.gradients, None
        config = self.config
        return update_(self.sae, self.optimizer, gradients, config.clip_norm, config.unit_decoder, self.mesh.latent)


class ByAutograd:
    """Gradients in `.grad`, then projection, clipping, Adam and renormalisation one after the other."""

    def __init__(self, config: Hyperparameters, sae: SAE, optimizer: torch.optim.Adam, mesh: Mesh, first: int) -> None:
        self.config, self.sae, self.optimizer, self.mesh, self.first = config, sae, optimizer, mesh, first

    def add(self, z: Tensor, recipe: Recipe, scale: float, dead: Tensor, n_dead: int) -> Losses:
        part = losses(self.sae, z, recipe, dead, n_dead, self.mesh, self.first)
        (part.objective * scale).backward()  # type: ignore[no-untyped-call]
        return Losses(*(value.detach() for value in part))

    def finite(self) -> Tensor:
        return torch.stack([self.mesh.data.sum_(gradient).sum() for gradient in self._gradients().values()]).sum().isfinite()

    def update(self, lr: float) -> Tensor:
        config, sae = self.config, self.sae
        if config.unit_decoder:
            sae.remove_parallel_gradient_()
        norm = self._norm()
        if config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(sae.parameters(), config.clip_norm, norm)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        if config.unit_decoder:
            sae.normalise_decoder_()
        if sae.threshold is not None:
            with torch.no_grad():
                sae.threshold.clamp_(min=0)
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

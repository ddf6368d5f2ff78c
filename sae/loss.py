"""What training minimises, for every architecture: reconstruction, sparsity penalty, and AuxK, which revives dead latents.

Shapes: N rows of this rank, n latents of this rank, d model width, K entries per row, G prefixes (1 but for Matryoshka).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.runtime import Mesh, Solo
from sae.model import SAE
from sae.parallel import best, best_of_batch, shared_by, sum_over
from sae.sparse import decode, encode_at

ALONE = Mesh(Solo(), Solo())


class Recipe(NamedTuple):
    """What the loss depends on besides weights and rows; numbers of latents count those of all ranks."""

    k: int
    k_aux: int = 0
    aux_coefficient: float = 0.0
    sparsity: float = 0.0
    """Weight of `relu`'s and `jumprelu`'s penalty."""
    bandwidth: float = 0.05
    """Width of the window around a threshold in which `jumprelu` has a gradient for it."""
    products: torch.dtype | None = None
    """Type of what sae.step multiplies; None: that of the weights."""


class Losses(NamedTuple):
    """Sums over the rows given and all d entries, so that ranks can add theirs, and how often each latent fired."""

    objective: Tensor
    """What is differentiated, also a sum."""
    main: Tensor
    """sum (z - z_hat)^2."""
    aux: Tensor
    """sum (e - e_hat)^2, 0 where nothing is dead."""
    penalty: Tensor
    """sum f_i ||W_dec_i|| for `relu`, number of active latents for `jumprelu`; of this rank's latents."""
    l0: Tensor
    """Active latents of this rank, summed over the rows."""
    fired: Tensor
    """Rows in which each latent was active: int32 [n], ready to be summed over ranks."""
    threshold: Tensor
    """The smallest value that `batchtopk` kept; 0 for others."""


def default_k_aux(d_model: int) -> int:
    """The power of two nearest to d_model / 2 (Gao et al. 2024, A.2)."""
    return 1 << round(math.log2(max(1, d_model / 2)))


def aux_weight(n_dead: int, k_aux: int, coefficient: float) -> float:
    """Weight of mean((e - e_hat)^2) in the loss: full where at least `k_aux` latents are dead."""
    return coefficient * min(1.0, n_dead / k_aux)


def losses(
    sae: SAE, z: Tensor, recipe: Recipe, dead: Tensor | None = None, n_dead: int = 0, mesh: Mesh = ALONE, first: int = 0
) -> Losses:
    """Loss sums of normalised rows `z` [N, d]. `sae` holds the latents of this rank, of which the first is `first`.

    `dead` int64 are this rank's dead latents and `n_dead` those of all ranks; AuxK is off where there are none, and for `relu`
    and `jumprelu`, whose penalty is what kills latents.
    """
    if sae.cfg.architecture in ("relu", "jumprelu"):
        return _dense_losses(sae, z, recipe, mesh)
    return _sparse_losses(sae, z, recipe, z.new_zeros(0, dtype=torch.long) if dead is None else dead, n_dead, mesh, first)


def _sparse_losses(sae: SAE, z: Tensor, recipe: Recipe, dead: Tensor, n_dead: int, mesh: Mesh, first: int) -> Losses:
    """TopK, BatchTopK and Matryoshka: K of n latents per row, chosen without a gradient.

    AuxK (Gao et al. 2024, A.2): the top `min(k_aux, n_dead)` dead latents of a row reconstruct its error `e = z - z_hat`, which
    is held fixed, without `b_pre`.
    """
    threshold, kept = z.new_zeros(()), None
    with_aux = n_dead > 0 and recipe.aux_coefficient > 0
    with torch.no_grad():
        h = sae.pre_activations(z)
        if sae.cfg.architecture == "batchtopk":
            indices, kept, threshold = best_of_batch(h, recipe.k, *mesh)
        else:
            indices, kept = best(h, recipe.k, mesh.latent)
        K = indices.shape[1]
        if with_aux:
            candidates = h.index_select(1, dead)
            chosen, kept_aux = best(candidates, min(recipe.k_aux, n_dead), mesh.latent)
            indices = torch.cat((indices, dead[chosen] if len(dead) else chosen), 1)
    values = encode_at((shared_by(mesh.latent, sae.b_pre), sae.W_enc, sae.b_enc), z, indices, h).relu()
    main_values, main_indices = _masked(values[:, :K], kept), indices[:, :K]
    z_hat = _reconstructions(sae, main_values, main_indices, mesh, first)
    errors = (z - z_hat).square().sum((1, 2))  # (G,)
    aux, objective = z.new_zeros(()), errors.mean()
    if with_aux:
        error = (z - z_hat[-1]).detach()
        aux_values = _masked(values[:, K:], kept_aux)
        aux = (error - sum_over(mesh.latent, decode(aux_values, indices[:, K:], sae.W_dec))).square().sum()
        objective = objective + aux_weight(n_dead, recipe.k_aux, recipe.aux_coefficient) * aux
    active = main_values.detach() > 0
    fired = torch.zeros(len(sae.W_enc), dtype=torch.int32, device=z.device)
    fired.scatter_add_(0, main_indices.flatten(), active.flatten().int())
    return Losses(objective, errors[-1], aux, z.new_zeros(()), active.sum(), fired, threshold)


def _masked(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values * kept


def _reconstructions(sae: SAE, values: Tensor, indices: Tensor, mesh: Mesh, first: int) -> Tensor:
    """`z_hat` [G, N, d] from the latents of each prefix, the last from all of them.

    Matryoshka (Bussmann et al. 2025, arXiv:2503.17547): latents below each boundary must reconstruct on their own.
    """
    ends = sae.cfg.prefixes
    if not ends:
        parts = decode(values, indices, sae.W_dec)[None]
    else:
        of_prefix = torch.bucketize(indices + first, torch.tensor(ends, device=indices.device), right=True)
        parts = torch.stack([decode(values * (of_prefix == g), indices, sae.W_dec) for g in range(len(ends))])
    return sum_over(mesh.latent, parts).cumsum(0) + sae.b_pre


def _dense_losses(sae: SAE, z: Tensor, recipe: Recipe, mesh: Mesh) -> Losses:
    """ReLU and JumpReLU, whose thousands of active latents early on make dense products the cheaper ones.

    ReLU: `sum (z - z_hat)^2 + sparsity * d * sum f_i ||W_dec_i||` (Templeton et al. 2024, Scaling Monosemanticity, whose weight
    is `sparsity * d`). JumpReLU: the number of active latents is penalised (Rajamanoharan et al. 2024, arXiv:2407.14435).
    """
    h = torch.addmm(sae.b_enc, z - shared_by(mesh.latent, sae.b_pre), sae.W_enc.T)
    if sae.threshold is None:
        f = h.relu()
        penalty = (f * torch.linalg.vector_norm(sae.W_dec, dim=1)).sum()
    else:
        f = _JumpReLU.apply(h, sae.threshold, recipe.bandwidth)  # type: ignore[no-untyped-call]
        penalty = _Step.apply(h, sae.threshold, recipe.bandwidth).sum()  # type: ignore[no-untyped-call]
    main = (z - sum_over(mesh.latent, f @ sae.W_dec) - sae.b_pre).square().sum()
    objective = main + recipe.sparsity * sae.cfg.d_model * penalty
    active = f.detach() > 0
    fired = active.sum(0, dtype=torch.int32)
    return Losses(objective, main, z.new_zeros(()), penalty, fired.sum(), fired, z.new_zeros(()))


def _window(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`K((h - threshold) / bandwidth) / bandwidth` with the rectangle kernel."""
    return ((h - threshold).abs() < bandwidth / 2).to(h.dtype) / bandwidth


class _JumpReLU(torch.autograd.Function):
    """`h` where above its threshold, else 0; the threshold's gradient is a kernel estimate (arXiv:2407.14435, eq. 11)."""

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
    """1 where `h` is above its threshold; no gradient for `h`, a kernel estimate for the threshold (eq. 12 there)."""

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

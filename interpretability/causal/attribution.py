"""How much every active feature of a prompt moves an objective, to first order: gradient x decoder row x activation.

At its site an activation is `x = sum_i a_i d_i + rest`, where a_i are the active latents, d_i what one
unit of each adds to x, and the rest is the decoder's bias and what the SAE does not explain. The rest
stays as it is, so the forward pass is that of the model alone, to the last bit. With g the gradient of
the objective at x, taking latent i out costs `a_i (d_i . g)` (attribution patching: Nanda 2023; with
the error term kept: Marks et al. 2024, arXiv:2403.19647). One batched pass forward and back gives the
gradients at all sites.

Shapes: T tokens, D width of a site, K latents stored per token, R rows (see objectives), H nodes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core.norms import row_norms
from interpretability.causal.objectives import Objective
from llama3 import Transformer
from sae.model import SAE
from sae.sparse import sampled_product


class Nodes(NamedTuple):
    """Active latents at positions, H of them: by SAE, position, and falling activation."""

    sae: Tensor
    """int64, the place of the latent's SAE in the list that was asked about."""
    position: Tensor
    latent: Tensor
    activation: Tensor
    """In the SAE's units."""
    unit: Tensor
    """What one unit adds to x there is so many times the latent's row of `W_dec`."""
    effect: Tensor
    """What the objective loses, to first order, if the latent is taken out there."""

    def take(self, chosen: Tensor) -> "Nodes":
        return Nodes(*(column[chosen] for column in self))


@dataclass(frozen=True)
class Attribution:
    """What `attribute` found."""

    nodes: Nodes
    errors: list[Tensor]
    """Of each SAE (T,): the same number for what it does not explain, 0 at positions that it was not trained on."""
    used: list[Tensor]
    """Of each SAE (T,) bool: positions that are attributed."""
    logits: Tensor
    """(V,) of the next token, in float64."""


class Gradients(NamedTuple):
    """Of an objective on one prompt."""

    x: dict[str, Tensor]
    """By site (T, D)."""
    g: dict[str, Tensor]
    """By site (R, T, D): of each of the objective's scores."""
    logits: Tensor
    """(R, V) in float64, rows that differ in their last bits at most."""


def gradients(model: Transformer, tokens: Tensor, sites: Sequence[str], objective: Objective) -> Gradients:
    """Activations at `sites` on `tokens` (T,) and their gradients; ValueError where one is not finite.

    The pass back stops at the first of the sites.
    """
    seen: dict[str, Tensor] = {}

    def watch(site: str, x: Tensor) -> Tensor:
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        seen[site] = x
        return x

    hooks = {site: (lambda x, site=site: watch(site, x)) for site in sites}
    with torch.enable_grad(), model.hooks(hooks):
        logits = model(tokens.expand(objective.n_rows, -1), last_only=True)[:, -1].double()
        found = torch.autograd.grad(objective.scores(logits).sum(), [seen[site] for site in sites])
    for site, g in zip(sites, found, strict=True):
        if not bool(torch.isfinite(g).all()):
            raise ValueError(
                f"the gradient at {site} is not finite: {_bad(g)} of {g.numel():,} numbers are NaN or infinite; the model "
                f"overflows in {model.dtype} on this prompt, so try another dtype or prompt"
            )
    x = {site: seen[site].detach()[0] for site in sites}
    return Gradients(x, dict(zip(sites, found, strict=True)), logits.detach())


def _bad(g: Tensor) -> str:
    return f"{int((~torch.isfinite(g)).sum()):,}"


def attribute(model: Transformer, saes: Sequence[SAE], tokens: Tensor, objective: Objective, bos: str = "none") -> Attribution:
    """Attribute `objective` on `tokens` (T,) to the active latents of `saes`, each at its own site.

    `bos` says whether the first token is BOS ("feed") or text ("none"). ValueError where an SAE has no active
    latent at any position that it was trained on, or where a gradient is not finite.
    """
    sites = list(dict.fromkeys(sae.site for sae in saes))
    found = gradients(model, tokens, sites, objective)
    parts, errors, used = [], [], []
    for number, sae in enumerate(saes):
        x, g = found.x[sae.site], found.g[sae.site]
        keep = trained_on(sae, x, bos)
        nodes, error = _nodes(sae, x, g, keep, objective, found.logits)
        if not len(nodes.latent):
            raise ValueError(
                f"no feature of the SAE at {sae.site} is active at any of the {int(keep.sum())} positions of the prompt that "
                "it was trained on; write a longer prompt"
            )
        parts.append(nodes._replace(sae=nodes.sae + number))
        errors.append(error)
        used.append(keep)
    nodes = Nodes(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return Attribution(nodes, errors, used, found.logits[0])


@torch.no_grad()
def _nodes(sae: SAE, x: Tensor, g: Tensor, keep: Tensor, objective: Objective, logits: Tensor) -> tuple[Nodes, Tensor]:
    """The active latents of one SAE where `keep` (T,), and what the objective owes to its error (T,)."""
    norm, latents = sae.normalise(x), sae.encode(x)
    dtype = sae.W_dec.dtype
    unit = 1 / norm.scale[:, 0]  # (T,)
    per_unit = torch.stack([sampled_product(row.to(dtype), sae.W_dec, latents.indices) for row in g])  # (R, T, K)
    first_order = per_unit.double() * (latents.values * unit[:, None]).double()
    active = (latents.values > 0) & keep[:, None]
    position = active.nonzero()[:, 0]
    nodes = Nodes(
        torch.zeros_like(position),
        position,
        latents.indices[active],
        latents.values[active],
        unit[position],
        objective.effects(first_order[:, active], logits),
    )
    error = (x.to(dtype) - sae.decode(latents, norm)).double()
    return nodes, objective.effects((g.double() * error).sum(-1), logits) * keep


def trained_on(sae: SAE, x: Tensor, bos: str) -> Tensor:
    """(T,) bool: whether rows like those of `x` (T, D) were among those that the SAE was trained on.

    Preprocessing drops rows of a norm above `max_norm`: attention sinks. Position 0 counts only where the SAE
    was trained on texts without BOS and reads one now; BOS itself is never stored, and of an SAE that does not
    say it is not known.
    """
    trained = sae.cfg.provenance
    keep = row_norms(x) <= (trained.get("max_norm") or math.inf)
    if not trained.get("bos") == bos == "none":
        keep[0] = False
    return keep


def by_latent(nodes: Nodes) -> Mapping[tuple[int, int], Tensor]:
    """The nodes of each latent: their places in `nodes`, by SAE and latent."""
    found: dict[tuple[int, int], list[int]] = {}
    for place, key in enumerate(zip(nodes.sae.tolist(), nodes.latent.tolist(), strict=True)):
        found.setdefault(key, []).append(place)
    return {key: torch.tensor(places) for key, places in found.items()}

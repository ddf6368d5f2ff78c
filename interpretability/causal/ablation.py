"""What an objective loses when latents are set to 0, measured: everything after them is computed again.

Shapes: T tokens, D width of a site, C cuts, B rows of a batch, P positions of a cut.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from interpretability.causal.attribution import Nodes
from interpretability.causal.objectives import Objective
from llama3 import Transformer
from sae.model import SAE


class Cut(NamedTuple):
    """Nodes of one SAE that are taken out together: one latent at one position or at several."""

    sae: SAE
    nodes: Nodes

    def contribution(self) -> Tensor:
        """(P, D) what the nodes add to x at their positions."""
        return (self.nodes.activation * self.nodes.unit)[:, None] * self.sae.W_dec[self.nodes.latent]


@torch.inference_mode()
def ablated(model: Transformer, tokens: Tensor, cuts: Sequence[Cut], objective: Objective, rows: int) -> Tensor:
    """(C,) float64: what the objective loses on `tokens` (T,) under each cut; at most `rows` rows a batch.

    A cut subtracts what its latents add; the other latents and the SAE's error stay. The first row of each batch
    is the prompt as it is, so that both sides of a difference come from one product and round alike.
    """
    found = []
    for first in range(0, len(cuts), max(1, rows - 1)):
        block = cuts[first : first + max(1, rows - 1)]
        hooks = {
            site: partial(_without, cuts=[(row, cut) for row, cut in enumerate(block, 1) if cut.sae.site == site])
            for site in {cut.sae.site for cut in block}
        }
        with model.hooks(hooks):
            logits = model(tokens.expand(len(block) + 1, -1), last_only=True)[:, -1].double()
        found.append(objective.measured(logits[0], logits[1:]))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


def _without(x: Tensor, cuts: Sequence[tuple[int, Cut]]) -> Tensor:
    """`x` (B, T, D) where each row lacks what its cut takes out."""
    rows = torch.cat([torch.full_like(cut.nodes.position, row) for row, cut in cuts])
    positions = torch.cat([cut.nodes.position for _, cut in cuts])
    taken = torch.cat([cut.contribution() for _, cut in cuts])
    return x.index_put((rows, positions), -taken.to(x.dtype), accumulate=True)

"""Gradients of an SAE in the form that is cheapest to apply: a leaf, for those who form them and
those who let them act.

Gradients of `W_enc` and `W_dec` are never stored. They are kept as what they are sums of, and
`RowGradients.rows` gives those of any run of latents. Shapes: N rows of this rank, n latents of
this rank, K entries per row, d model width, D dead latents.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.runtime import Comm


class Entries(NamedTuple):
    """Gradients of `W_enc` and `W_dec` by E = N * K active (row, latent) pairs, sorted by latent."""

    row: Tensor  # [E]
    starts: Tensor  # [n + 1], where each latent's begin
    values: Tensor  # [E], activation
    g_values: Tensor  # [E], its gradient
    centred: Tensor  # [N, d], z - b_pre, of the products' type
    g_decoded: Tensor  # [N, d], gradient of what the activations decode to, likewise
    b_enc: Tensor  # [n], gradient of b_enc

    def add_rows(self, start: int, stop: int, enc: Tensor, dec: Tensor) -> None:
        starts = self.starts[start : stop + 1]
        first, last = int(starts[0]), int(starts[-1])
        row, offsets = self.row[first:last], starts - first
        for out, dense, weights in ((enc, self.centred, self.g_values), (dec, self.g_decoded, self.values)):
            out += F.embedding_bag(
                row,
                dense.to(weights.dtype),
                offsets,
                mode="sum",
                per_sample_weights=weights[first:last],
                include_last_offset=True,
            )


class DenseRows(NamedTuple):
    """Gradients of some latents only, sorted: `latents` [D], `W_enc` and `W_dec` [D, d], `b_enc`
    [n].
    """

    latents: Tensor
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor

    def add_rows(self, start: int, stop: int, enc: Tensor, dec: Tensor) -> None:
        bounds = torch.tensor([start, stop], device=enc.device)
        first, last = torch.searchsorted(self.latents, bounds).tolist()
        local = self.latents[first:last] - start
        enc.index_add_(0, local, self.W_enc[first:last].to(enc.dtype))
        dec.index_add_(0, local, self.W_dec[first:last].to(dec.dtype))


class RowGradients(NamedTuple):
    """Gradients of all parameters, of the rows of all ranks; those of `W_enc` and `W_dec` are sums
    over `parts` and ranks.
    """

    b_pre: Tensor
    b_enc: Tensor
    parts: list[Entries | DenseRows]
    data: Comm

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Gradients of `W_enc[start:stop]` and `W_dec[start:stop]`, [stop - start, d] each."""
        enc = self.b_pre.new_zeros(stop - start, len(self.b_pre))
        dec = torch.zeros_like(enc)
        for part in self.parts:
            part.add_rows(start, stop, enc, dec)
        return self.data.sum_(enc), self.data.sum_(dec)

    def plus(self, other: "RowGradients") -> "RowGradients":
        return RowGradients(self.b_pre + other.b_pre, self.b_enc + other.b_enc, self.parts + other.parts, self.data)

    def finite(self) -> Tensor:
        """Whether the gradients of the biases, in which every entry of the others takes part, are
        finite: bool [].
        """
        return (self.b_pre.sum() + self.b_enc.sum()).isfinite()

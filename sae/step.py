"""A TopK training step written out by hand: the loss, and its gradients in the form that is cheapest to apply.

The gradients of `W_enc` and `W_dec` are never stored. They are kept as what they are sums of, a few entries per row sorted by
latent, and `RowGradients.rows` gives those of any run of latents; `sae.update` forms a block of them, lets it act, and forgets
it. `losses` in sae.loss is the same by autograd, for every architecture and number of ranks, and the twin in the tests.
Shapes: N rows, n latents, K entries per row, d model width, D dead latents, B rows of a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.product import linear
from sae.model import SAE
from sae.sparse import bag, sampled_product, sums_by_latent, transpose
from sae.topk import top_k

# Pre-activations in memory at a time. On a CPU 16 MB stay in the last level of cache and, unlike larger blocks, are handed back
# and forth by malloc without asking the kernel for zeroed pages, which costs as much as a quarter of the product itself.
CPU_ELEMENTS, GPU_ELEMENTS = 2**22, 2**29
DENSE_FACTOR = 6  # on a CPU an entry of a sparse product costs about as much as so many of a dense one


class Weights(NamedTuple):
    """What turns sums into the loss that is differentiated: `main * sum (z - z_hat)^2 + aux * sum (e - e_hat)^2`."""

    main: float
    aux: float = 0.0


class Entries(NamedTuple):
    """Gradients of `W_enc` and `W_dec` by E = N * K active (row, latent) pairs, sorted by latent."""

    row: Tensor  # [E]
    starts: Tensor  # [n + 1], where each latent's begin
    values: Tensor  # [E], activation
    g_values: Tensor  # [E], its gradient
    centred: Tensor  # [N, d], z - b_pre
    g_decoded: Tensor  # [N, d], gradient of what the activations decode to
    b_enc: Tensor  # [n], gradient of b_enc

    def add_rows(self, start: int, stop: int, enc: Tensor, dec: Tensor) -> None:
        starts = self.starts[start : stop + 1]
        first, last = int(starts[0]), int(starts[-1])
        row, offsets = self.row[first:last], starts - first
        for out, dense, weights in ((enc, self.centred, self.g_values), (dec, self.g_decoded, self.values)):
            out += F.embedding_bag(
                row, dense, offsets, mode="sum", per_sample_weights=weights[first:last], include_last_offset=True
            )


class DenseRows(NamedTuple):
    """Gradients of some latents only, sorted: `latents` [D], `W_enc` and `W_dec` [D, d], `b_enc` [n]."""

    latents: Tensor
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor

    def add_rows(self, start: int, stop: int, enc: Tensor, dec: Tensor) -> None:
        bounds = torch.tensor([start, stop], device=enc.device)
        first, last = torch.searchsorted(self.latents, bounds).tolist()
        local = self.latents[first:last] - start
        enc.index_add_(0, local, self.W_enc[first:last])
        dec.index_add_(0, local, self.W_dec[first:last])


class RowGradients(NamedTuple):
    """Gradients of all parameters; those of `W_enc` and `W_dec` are sums over `parts`."""

    b_pre: Tensor
    b_enc: Tensor
    parts: list[Entries | DenseRows]

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Gradients of `W_enc[start:stop]` and `W_dec[start:stop]`, [stop - start, d] each."""
        enc = self.b_pre.new_zeros(stop - start, len(self.b_pre))
        dec = torch.zeros_like(enc)
        for part in self.parts:
            part.add_rows(start, stop, enc, dec)
        return enc, dec

    def finite(self) -> Tensor:
        """Whether the gradients of the biases, in which every entry of the others takes part, are finite: bool []."""
        return (self.b_pre.sum() + self.b_enc.sum()).isfinite()


class StepLosses(NamedTuple):
    """Sums over rows and entries as in sae.loss.Losses, and the gradients of the weighted loss."""

    main: Tensor
    aux: Tensor
    l0: Tensor
    fired: Tensor
    gradients: RowGradients


@torch.no_grad()
def topk_step(sae: SAE, z: Tensor, weights: Weights, dead: Tensor | None = None, k_aux: int = 0) -> StepLosses:
    """Loss and gradients of normalised rows `z` [N, d], N at least 1.

    `dead` [D] int64, sorted, are the dead latents, of which the best `min(k_aux, D)` of each row reconstruct its error (Gao et
    al. 2024, A.2); None or none of them: no AuxK.
    """
    n, on_cpu = len(sae.W_enc), z.device.type == "cpu"
    auxiliary = None
    if dead is not None and len(dead):
        is_sparse = on_cpu and len(dead) > DENSE_FACTOR * k_aux
        auxiliary = (_SparseAuxiliary if is_sparse else _DenseAuxiliary)(sae, dead, k_aux, weights.aux)
    centred = z - sae.b_pre
    blocks = []
    for block in torch.split(centred, max(1, (CPU_ELEMENTS if on_cpu else GPU_ELEMENTS) // n)):
        h = linear(block, sae.W_enc, sae.b_enc)
        values, indices = top_k(h, sae.cfg.k)
        error = block - bag(values.relu_(), indices, sae.W_dec)  # z - z_hat: b_pre cancels
        if auxiliary is not None:
            auxiliary.add(block, h, error)
        blocks.append((values, indices, error))
    values, indices, error = (torch.cat(column) for column in zip(*blocks, strict=True))

    main, active = error.square().sum(), values > 0
    fired = torch.zeros(n, dtype=torch.int32, device=z.device)
    fired.scatter_add_(0, indices.flatten(), active.flatten().int())
    g_z_hat = error.mul_(-2 * weights.main)
    parts: list[Entries | DenseRows] = [_entries(sae, values, indices, centred, g_z_hat)]
    if auxiliary is not None:
        parts.append(auxiliary.gradients(centred))
    b_enc = torch.stack([part.b_enc for part in parts]).sum(0)
    b_pre = g_z_hat.sum(0) - b_enc @ sae.W_enc
    aux = auxiliary.total if auxiliary is not None else z.new_zeros(())
    return StepLosses(main, aux, active.sum(), fired, RowGradients(b_pre, b_enc, parts))


def _entries(sae: SAE, values: Tensor, indices: Tensor, centred: Tensor, g_decoded: Tensor) -> Entries:
    """Gradients of `bag(values, indices, W_dec)`, given its own, `g_decoded` [N, d]; values of 0 did not pass the ReLU."""
    g_values = sampled_product(g_decoded, sae.W_dec, indices).mul_(values > 0)
    by_latent = transpose(indices, len(sae.W_enc))
    return Entries(
        by_latent.rows,
        by_latent.starts,
        values.flatten()[by_latent.order],
        g_values.flatten()[by_latent.order],
        centred,
        g_decoded,
        sums_by_latent(g_values, by_latent),
    )


class _Auxiliary:
    """AuxK, added up block by block: `add` takes rows z - b_pre [B, d], their `h` [B, n] and `error` [B, d], held fixed."""

    def __init__(self, sae: SAE, dead: Tensor, k_aux: int, weight: float) -> None:
        self.sae, self.dead, self.k_aux, self.weight = sae, dead, k_aux, weight
        self.total = sae.W_dec.new_zeros(())

    def _missed(self, error: Tensor, e_hat: Tensor) -> Tensor:
        """The gradient of `e_hat`."""
        missed = error - e_hat
        self.total += missed.square().sum()
        return missed.mul_(-2 * self.weight)


class _DenseAuxiliary(_Auxiliary):
    """By dense products over the dead latents: for few of them, or where a processor is made for dense products."""

    def __init__(self, sae: SAE, dead: Tensor, k_aux: int, weight: float) -> None:
        super().__init__(sae, dead, k_aux, weight)
        self.rows = sae.W_dec[dead]  # (D, d)
        self.W_enc, self.W_dec = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.b_enc = self.rows.new_zeros(len(dead))

    def add(self, centred: Tensor, h: Tensor, error: Tensor) -> None:
        f = h.index_select(1, self.dead).relu_()  # (B, D)
        if len(self.dead) > self.k_aux:
            best_values, best = top_k(f, self.k_aux)
            f = torch.zeros_like(f).scatter_(1, best, best_values)
        g = self._missed(error, f @ self.rows)
        g_f = (g @ self.rows.T).mul_(f > 0)
        self.W_dec.addmm_(f.T, g)
        self.W_enc.addmm_(g_f.T, centred)
        self.b_enc += g_f.sum(0)

    def gradients(self, centred: Tensor) -> DenseRows:
        b_enc = centred.new_zeros(len(self.sae.W_enc)).index_add_(0, self.dead, self.b_enc)
        return DenseRows(self.dead, self.W_enc, self.W_dec, b_enc)


class _SparseAuxiliary(_Auxiliary):
    """By the same sparse products as the reconstruction itself: for many dead latents on a CPU."""

    def __init__(self, sae: SAE, dead: Tensor, k_aux: int, weight: float) -> None:
        super().__init__(sae, dead, k_aux, weight)
        self.blocks: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, centred: Tensor, h: Tensor, error: Tensor) -> None:
        values, best = top_k(h.index_select(1, self.dead), self.k_aux)
        indices = self.dead[best]
        g = self._missed(error, bag(values.relu_(), indices, self.sae.W_dec))
        self.blocks.append((values, indices, g))

    def gradients(self, centred: Tensor) -> Entries:
        values, indices, g = (torch.cat(column) for column in zip(*self.blocks, strict=True))
        return _entries(self.sae, values, indices, centred, g)

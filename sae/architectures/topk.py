"""TopK (Gao et al. 2024, arXiv:2406.04093), with a training step written out by hand: the loss, and
its gradients in the form that is cheapest to apply.

The gradients of `W_enc` and `W_dec` are never stored: a few entries per row, sorted by latent,
stand for them (sae.gradients), and sae.update forms a block at a time. `losses` is the same by
autograd, and the twin in the tests.
Shapes: N rows of this rank, n latents of this rank, K entries per row, d model width, D dead
latents, B rows of a block.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.product import linear
from core.runtime import Comm, Mesh
from sae.architectures._sparse import SparseSAE, aux_latents
from sae.gradients import DenseRows, Entries, RowGradients
from sae.hyperparameters import Hyperparameters
from sae.loss import ALONE, LossConfig, Losses, aux_weight
from sae.memory import Share, choosing_bytes, entry_bytes
from sae.model import CPU_ELEMENTS, GPU_ELEMENTS
from sae.parallel import sharded_top_k
from sae.sparse import bag, sampled_product, sums_by_latent, transpose
from sae.topk import top_k
from sae.update import CPU_ELEMENTS as CPU_GRADIENTS
from sae.update import GPU_ELEMENTS as GPU_GRADIENTS

DENSE_FACTOR = 6  # on a CPU an entry of a sparse product costs about as much as so many of a dense one
BLOCKS = 3  # of gradients at work in sae.update; none where a kernel does it


class TopK(SparseSAE):
    """The k largest latents of each row, where positive: L0 is at most k."""

    selects_top_k = True
    exports: ClassVar = {"saelens": "topk", "sparsify": "topk", "dictionary_learning": "AutoEncoderTopK"}

    @torch.no_grad()
    def row_gradients(
        self, z: Tensor, config: LossConfig, scale: float, dead: Tensor | None = None, n_dead: int = 0, mesh: Mesh = ALONE
    ) -> tuple[Losses, RowGradients]:
        """Loss sums of normalised rows `z` [N, d], and the gradients of `scale` times the
        objective.

        Arguments and sums are those of `losses`; `dead` is sorted.
        """
        latent, n, on_cpu = mesh.latent, len(self.W_enc), z.device.type == "cpu"
        of_products = config.products or z.dtype
        weights = Weights(*(weight.to(of_products) for weight in (self.W_enc, self.b_enc, self.W_dec)))
        auxiliary = None
        if dead is not None and n_dead and config.aux_coefficient:
            is_sparse = on_cpu and len(dead) > DENSE_FACTOR * config.k_aux
            auxiliary = (_SparseAuxiliary if is_sparse else _DenseAuxiliary)(weights.W_dec, dead, n_dead, config, scale, latent)
        exact = z - self.b_pre
        centred = exact.to(of_products)
        blocks, step = [], max(1, (CPU_ELEMENTS if on_cpu else GPU_ELEMENTS) // n)
        for block, rounded in zip(torch.split(exact, step), torch.split(centred, step), strict=True):
            h = linear(rounded, weights.W_enc, weights.b_enc)
            values, indices = _largest(h, config.k, latent)
            values = values.to(z.dtype)
            error = block - latent.sum_(bag(values, indices, weights.W_dec))  # z - z_hat: b_pre cancels
            if auxiliary is not None:
                auxiliary.add(rounded, h, error)
            blocks.append((values, indices, error))
        values, indices, error = _joined(blocks)

        main, active = error.square().sum(), values > 0
        fired = torch.zeros(n, dtype=torch.int32, device=z.device)
        fired.scatter_add_(0, indices.flatten(), active.flatten().int())
        g_z_hat = error.mul_(-2 * scale)
        parts: list[Entries | DenseRows] = [_entries(weights.W_dec, values, indices, centred, g_z_hat)]
        aux = z.new_zeros(())
        if auxiliary is not None:
            parts.append(auxiliary.gradients(centred))
            aux = auxiliary.total
        b_enc = torch.stack([part.b_enc for part in parts]).sum(0)
        b_pre = g_z_hat.sum(0) - latent.sum_(b_enc @ self.W_enc)
        gradients = RowGradients(mesh.data.sum_(b_pre), mesh.data.sum_(b_enc), parts, mesh.data)
        objective = main + aux_weight(n_dead, config.k_aux, config.aux_coefficient) * aux
        return Losses(objective, main, aux, z.new_zeros(()), active.sum(), fired, z.new_zeros(())), gradients

    @classmethod
    def step_bytes(cls, config: Hyperparameters, share: Share) -> int:
        """Pre-activations in blocks, then gradients in blocks; on a GPU, copies in the products'
        type.
        """
        n, d, rows, data, device = share
        on_gpu, size, products = device.type != "cpu", config.number_bytes, LossConfig.at(config, 0, d, device).products
        k, k_aux = min(n, config.k), aux_latents(config, share)
        product = products.itemsize if products else size
        copies = (2 * n * d + n) * product if products else 0
        block = min(rows, max(1, (GPU_ELEMENTS if on_gpu else CPU_ELEMENTS) // n))
        alive = 2 if k_aux else 1  # the dead latents' columns
        choosing = alive * block * n * product + choosing_bytes(block, n, max(config.k, k_aux), product)
        dead = 3 * n * d * product if on_gpu and k_aux else 0  # their rows, and the gradients of those
        blocks = BLOCKS if data > 1 or not on_gpu else 0
        update = min(GPU_GRADIENTS if on_gpu else CPU_GRADIENTS, n * d) * size * blocks
        return copies + dead + max(choosing, update) + entry_bytes(k + k_aux, config, share) + 5 * rows * d * size


class Weights(NamedTuple):
    """What the products multiply with, in their type."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor


def _largest(h: Tensor, k: int, latent: Comm) -> tuple[Tensor, Tensor]:
    """This rank's share of the k largest of each row of `h`, 0 where negative: values [N, K] and
    indices.
    """
    if latent.size == 1:
        values, indices = top_k(h, k)
        return values.relu_(), indices
    indices, kept = sharded_top_k(h, k, latent)
    if h.shape[1] == 0:
        return h, indices[:, :0]
    return h.gather(1, indices).relu_().masked_fill_(~kept, 0), indices  # type: ignore[operator]


def _joined(blocks: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and vectors of all blocks; in latent parallel a rank's share differs in width
    from block to block.
    """
    if len(blocks) == 1:
        return blocks[0]
    K = max(values.shape[1] for values, _, _ in blocks)
    padded = [(F.pad(v, (0, K - v.shape[1])), F.pad(i, (0, K - i.shape[1])), vectors) for v, i, vectors in blocks]
    values, indices, vectors = (torch.cat(column) for column in zip(*padded, strict=True))
    return values, indices, vectors


def _entries(W_dec: Tensor, values: Tensor, indices: Tensor, centred: Tensor, g_decoded: Tensor) -> Entries:
    """Gradients of `bag(values, indices, W_dec)`, given its own, `g_decoded` [N, d]; values of 0
    did not pass the ReLU.
    """
    g_values = sampled_product(g_decoded, W_dec, indices).mul_(values > 0)
    by_latent = transpose(indices, len(W_dec))
    return Entries(
        by_latent.rows,
        by_latent.starts,
        values.flatten()[by_latent.order],
        g_values.flatten()[by_latent.order],
        centred,
        g_decoded.to(centred.dtype),
        sums_by_latent(g_values, by_latent),
    )


class _Auxiliary:
    """AuxK, added up block by block: `add` takes rows z - b_pre [B, d], their `h` [B, n] and
    `error` [B, d], held fixed.
    """

    def __init__(self, W_dec: Tensor, dead: Tensor, n_dead: int, config: LossConfig, scale: float, latent: Comm) -> None:
        self.W_dec, self.dead, self.latent = W_dec, dead, latent
        self.k, self.all_chosen = min(config.k_aux, n_dead), n_dead <= config.k_aux
        self.weight = scale * aux_weight(n_dead, config.k_aux, config.aux_coefficient)
        self.total = torch.zeros((), dtype=torch.promote_types(W_dec.dtype, torch.float32), device=W_dec.device)

    def _missed(self, error: Tensor, part_of_e_hat: Tensor) -> Tensor:
        """The gradient of `e_hat`."""
        missed = error - self.latent.sum_(part_of_e_hat.to(error.dtype))
        self.total += missed.square().sum()
        return missed.mul_(-2 * self.weight)


class _DenseAuxiliary(_Auxiliary):
    """By dense products over the dead latents: for few of them, or where a processor is made for
    dense products.
    """

    def __init__(self, W_dec: Tensor, dead: Tensor, n_dead: int, config: LossConfig, scale: float, latent: Comm) -> None:
        super().__init__(W_dec, dead, n_dead, config, scale, latent)
        self.rows = W_dec[dead]  # (D, d)
        self.g_enc, self.g_dec = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.b_enc = self.total.new_zeros(len(dead))

    def add(self, centred: Tensor, h: Tensor, error: Tensor) -> None:
        f = h.index_select(1, self.dead).relu_()  # (B, D)
        if not self.all_chosen:
            values, chosen = _largest(f, self.k, self.latent)
            f = torch.zeros_like(f).scatter_(1, chosen, values)
        g = self._missed(error, f @ self.rows).to(f.dtype)
        g_f = (g @ self.rows.T).mul_(f > 0)
        self.g_dec.addmm_(f.T, g)
        self.g_enc.addmm_(g_f.T, centred)
        self.b_enc += g_f.sum(0, dtype=self.b_enc.dtype)

    def gradients(self, centred: Tensor) -> DenseRows:
        b_enc = self.b_enc.new_zeros(len(self.W_dec)).index_add_(0, self.dead, self.b_enc)
        return DenseRows(self.dead, self.g_enc, self.g_dec, b_enc)


class _SparseAuxiliary(_Auxiliary):
    """By the same sparse products as the reconstruction itself: for many dead latents on a CPU."""

    def __init__(self, W_dec: Tensor, dead: Tensor, n_dead: int, config: LossConfig, scale: float, latent: Comm) -> None:
        super().__init__(W_dec, dead, n_dead, config, scale, latent)
        self.blocks: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, centred: Tensor, h: Tensor, error: Tensor) -> None:
        values, chosen = _largest(h.index_select(1, self.dead), self.k, self.latent)
        indices = self.dead[chosen]
        g = self._missed(error, bag(values, indices, self.W_dec))
        self.blocks.append((values, indices, g))

    def gradients(self, centred: Tensor) -> Entries:
        values, indices, g = _joined(self.blocks)
        return _entries(self.W_dec, values, indices, centred, g)


ARCHITECTURE = TopK

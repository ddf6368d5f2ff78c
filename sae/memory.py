"""Bytes that a rank of a training run holds at the peak of a step, by architecture, before it starts.

The counts follow sae.descent, sae.step and sae.loss tensor by tensor; tests/test_plan.py compares them with what PyTorch's CPU
allocator gives out. Shapes: N rows of a step, n latents of this rank, d model width.
"""

import math
from typing import NamedTuple

import torch

from sae.hyperparameters import Hyperparameters
from sae.loss import default_k_aux
from sae.model import CPU_ELEMENTS, GPU_ELEMENTS
from sae.topk import group_size
from sae.update import CPU_ELEMENTS as CPU_GRADIENTS
from sae.update import GPU_ELEMENTS as GPU_GRADIENTS

INDEX_BYTES = 8
DENSE_TENSORS = {"relu": 4, "jumprelu": 6}  # [N, n] at once, forward and backward
BLOCKS = 3  # of gradients at work in sae.update; none where a kernel does it


class Share(NamedTuple):
    """What falls to one rank."""

    latents: int
    d: int
    rows: int
    """Of a step."""
    data: int
    """Ranks that share out the rows."""
    device: torch.device


class Memory(NamedTuple):
    """Bytes of one rank."""

    held: int
    """Weights and Adam's two moments: from the first step to the last."""
    step: int
    """What comes and goes within a step, at its peak."""


def memory_of_rank(config: Hyperparameters, share: Share) -> Memory:
    """Where AuxK is on, all latents are taken for dead, which is when it takes most."""
    size = 8 if config.dtype == "float64" else 4
    n, d, rows = share.latents, share.d, math.ceil(share.rows / config.accumulate)
    parameters, matrix, z = (2 * n * d + n + d) * size, n * d * size, rows * d * size
    if config.architecture in DENSE_TENSORS:
        dense = rows * n * size
        most = max(DENSE_TENSORS[config.architecture] * dense + matrix, 2 * dense + 3 * matrix)
        return Memory(3 * parameters, most + 4 * z)
    k = min(n, config.k * (8 if config.architecture == "batchtopk" else 1))  # candidates double until no row holds more
    k_aux = min(n, config.aux_k or default_k_aux(d)) if config.aux_coefficient else 0
    entries = rows * (k + k_aux) * (4 * size + 3 * INDEX_BYTES)  # values and their gradients; indices, sorted, by latent
    if config.architecture == "topk":
        return Memory(3 * parameters, _by_hand(config, share._replace(rows=rows), k_aux) + entries + 5 * z)
    choosing = rows * n * size * (2 if k_aux else 1) + _choosing(rows, n, max(k, k_aux), size)
    if config.architecture == "batchtopk":
        choosing += entries  # its candidates
    gradients = parameters + matrix + entries
    return Memory(3 * parameters, max(choosing, gradients) + 4 * z * max(1, len(config.prefixes) // 2))


def _by_hand(config: Hyperparameters, share: Share, k_aux: int) -> int:
    """sae.step and sae.update: pre-activations in blocks, then gradients in blocks; on a GPU, copies in the products' type."""
    n, d, rows, data, device = share
    on_gpu, size, products = device.type != "cpu", 8 if config.dtype == "float64" else 4, config.recipe(0, d, device).products
    product = products.itemsize if products else size
    copies = (2 * n * d + n) * product if products else 0
    block = min(rows, max(1, (GPU_ELEMENTS if on_gpu else CPU_ELEMENTS) // n))
    alive = 2 if k_aux else 1  # the dead latents' columns
    choosing = alive * block * n * product + _choosing(block, n, max(config.k, k_aux), product)
    dead = 3 * n * d * product if on_gpu and k_aux else 0  # their rows, and the gradients of those
    update = min(GPU_GRADIENTS if on_gpu else CPU_GRADIENTS, n * d) * size * (BLOCKS if data > 1 or not on_gpu else 0)
    return copies + dead + max(choosing, update)


def _choosing(rows: int, n: int, k: int, size: int) -> int:
    """sae.topk: the maxima of the groups, and the members of the best k."""
    group = group_size(n, k)
    return 0 if group == 1 else rows * (n // group + k * group) * size

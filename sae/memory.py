"""Bytes that a rank of a training run holds at the peak of a step, before it starts.

What a step holds is counted by its architecture, tensor by tensor; tests/test_plan.py compares the
sums with what PyTorch's CPU allocator gives out.
"""

import math
from typing import NamedTuple

import torch

from sae.architectures import architecture
from sae.hyperparameters import Hyperparameters
from sae.topk import group_size

INDEX_BYTES = 8


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
    part = share._replace(rows=math.ceil(share.rows / config.accumulate))
    return Memory(3 * parameter_bytes(config, share), architecture(config.architecture).step_bytes(config, part))


def parameter_bytes(config: Hyperparameters, share: Share) -> int:
    """Of what is trained on a rank, or of its gradients."""
    per_latent: int = 2 * share.d + architecture(config.architecture).scalars
    return (share.latents * per_latent + share.d) * config.number_bytes


def entry_bytes(k: int, config: Hyperparameters, share: Share) -> int:
    """Of `k` active latents in each row: values and their gradients; indices, sorted, by latent."""
    return share.rows * k * (4 * config.number_bytes + 3 * INDEX_BYTES)


def choosing_bytes(rows: int, n: int, k: int, size: int) -> int:
    """sae.topk: the maxima of the groups, and the members of the best k; `size` is that of a
    number.
    """
    group = group_size(n, k)
    return 0 if group == 1 else rows * (n // group + k * group) * size

"""Which documents are held out for validation: decided by hash, so that any stage can tell without a list."""

from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor


def is_held_out(document_id: int, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation split: xxh3 of its id, as a share of 2^64, lies below `fraction`."""
    return xxhash.xxh3_64_intdigest(document_id.to_bytes(8, "little", signed=True), seed=seed) < fraction * 2**64


def held_out(document_ids: Tensor | Iterable[int], fraction: float, seed: int) -> Tensor:
    """`is_held_out` of each of `document_ids` [n]: bool [n]."""
    ids = torch.as_tensor(document_ids, dtype=torch.long)
    unique, where = torch.unique(ids, return_inverse=True)
    return torch.tensor([is_held_out(i, fraction, seed) for i in unique.tolist()], dtype=torch.bool)[where]

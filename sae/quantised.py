"""Matrices stored as 8-bit integers with a float32 scale per row: a quarter of the bytes.

`row = scale * integers`, the largest entry of a row at 127, and the scale such that the norm of the row is kept: rows of
`W_dec` stay of unit norm. Biases and other vectors stay as they are.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from core.norms import row_norms

Storage = torch.dtype | Literal["int8"] | None
"""What the tensors of an SAE are stored in; None: as they are."""

LARGEST = 127
SCALES = "_scales"
"""What the name of a matrix ends with where its scales [n] are meant."""


def quantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix [n, d] as int8 [n, d] and its scales [n] under the name with SCALES; other tensors in float32."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            found[name] = tensor.float()
            continue
        rows = tensor.float()
        largest = rows.abs().amax(1, keepdim=True)
        integers = (rows * (LARGEST / largest.where(largest > 0, 1.0))).round()
        norms = row_norms(integers)
        found[name] = integers.to(torch.int8)
        found[name + SCALES] = (row_norms(rows) / norms.where(norms > 0, 1.0)).float()
    return found


def dequantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `quantised` was made from, but for rounding; tensors that were not quantised are left as they are.

    ValueError where scales are missing, of another shape, or belong to nothing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        of = name.removesuffix(SCALES)
        if of != name:
            if of not in tensors or tensors[of].dtype != torch.int8:
                raise ValueError(f"holds {name}, but {of} is not stored as int8")
            continue
        if tensor.dtype != torch.int8:
            found[name] = tensor
            continue
        scales = tensors.get(name + SCALES)
        if scales is None or scales.shape != tensor.shape[:1]:
            shape = "none" if scales is None else list(scales.shape)
            raise ValueError(
                f"{name} is int8 {list(tensor.shape)}: expected {name + SCALES} {list(tensor.shape[:1])}, found {shape}"
            )
        found[name] = tensor.float() * scales.float()[:, None]
    return found

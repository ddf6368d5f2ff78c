"""The types in which activations are stored: bf16, fp32, or int8 with one scale per row.

Shapes: N rows, D width of a site.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from core.int8 import dequantise, quantise
from core.norms import row_norms

Storage = Literal["bf16", "fp32", "int8"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}


class StoredRows(NamedTuple):
    """Rows as they lie in a file."""

    activations: Tensor
    """(N, D) bfloat16, float32 or int8."""
    scales: Tensor | None
    """(N,) float32 for int8, else None."""

    @classmethod
    def empty(cls, n_rows: int, width: int, storage: Storage, device: torch.device) -> Self:
        scales = torch.empty(n_rows, device=device) if storage == "int8" else None
        return cls(torch.empty(n_rows, width, dtype=DTYPES[storage], device=device), scales)

    def put_(self, places: Tensor, x: Tensor) -> None:
        """Store the rows `x` at `places`."""
        if self.scales is None:
            self.activations.index_copy_(0, places, x.to(self.activations.dtype))
        else:
            values, scales = quantise(x)
            self.activations.index_copy_(0, places, values)
            self.scales.index_copy_(0, places, scales)

    def floats(self) -> Tensor:
        """(N, D) as readers get them: float32 where stored in int8, else the very tensor."""
        return self.activations if self.scales is None else dequantise(self.activations, self.scales)

    def norms(self) -> Tensor:
        """(N,) float64; not finite exactly where a value is not."""
        return row_norms(self.floats())

    def kept(self, mask: Tensor) -> "StoredRows":
        """The rows where `mask` (N,) is True."""
        return self.map(lambda x: x[mask.to(x.device)])

    def map(self, act: Callable[[Tensor], Tensor]) -> "StoredRows":
        """`act` on each tensor."""
        return StoredRows(act(self.activations), None if self.scales is None else act(self.scales))

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file."""
        named = {"activations": self.activations, "scales": self.scales}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

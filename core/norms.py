"""Norms of rows, in float64: squares of float32 numbers overflow float32 from 1.8e19 on, and below 1e-19 they are zero where a
processor flushes subnormal numbers. In float64 none does either.
"""

import torch
from torch import Tensor

LARGEST, SMALLEST = 1e16, 1e-16
"""Norms within which float32 has room for squares and their sums, and for the factors that bring rows to sqrt(d) and back."""
CPU_ROWS, GPU_ROWS = 256, 2**16  # at a time; on a CPU so many in float64 stay in the cache


def row_norms(x: Tensor) -> Tensor:
    """Euclidean norm of each row of `x` [..., d], float64 [...]: finite exactly where all of the row is."""
    norms = [torch.linalg.vector_norm(block.double(), dim=1) for block in _blocks(x.reshape(-1, x.shape[-1]))]
    return torch.cat(norms).view(x.shape[:-1])


def unit_rows(x: Tensor) -> Tensor:
    """`x` [n, d] with each row at unit norm, in its own type; a row of zeros stays one."""
    found = []
    for block in _blocks(x):
        rows = block.double()
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        found.append((rows / norms.where(norms > 0, 1)).to(x.dtype))
    return torch.cat(found)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, CPU_ROWS if x.is_cpu else GPU_ROWS)

"""The one kind of matrix in the model: a linear map without bias, by the fastest kernel that PyTorch has for it."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
"""Whether large float32 products go to oneDNN. PyTorch gives them to MKL, which runs at less than half the rate on AMD
processors (pytorch/builder issue 504; measured in docs/log.md)."""

LARGE_WEIGHT, LARGE_PRODUCT = 2**17, 2**20
"""Numbers in W, and multiplications in `x W^T`, from either of which on oneDNN's longer call (about 10 us) is worth it."""


class Linear(nn.Module):
    """`x W^T`: x (..., n_in), W (n_out, n_in), result (..., n_out). Starts at zero, so that loading pays for no random numbers."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T`: x (..., n_in), W (n_out, n_in), result (..., n_out)."""
    if ONEDNN and x.dtype == torch.float32 and x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if weight.numel() >= LARGE_WEIGHT or x.numel() * weight.shape[0] >= LARGE_PRODUCT:
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    return F.linear(x, weight)

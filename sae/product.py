"""The one dense product of an SAE: every latent's pre-activation.

Shapes: N rows, n latents, d model width.
"""

import torch
from torch import Tensor

# oneDNN's own float32 product, which torch.addmm reaches only for reduced precision: on an AMD EPYC with AVX-512 it takes half
# the time of MKL's, which keeps its AVX-512 code for Intel (docs/performance.md).
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


def dense_product(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`z @ weight.T + bias`: [N, n] from [N, d], [n, d] and [n]. No gradient travels through it."""
    with torch.no_grad():
        if _ONEDNN and z.device.type == "cpu" and z.dtype == torch.float32 and len(z):
            out: Tensor = torch.ops.mkldnn._linear_pointwise(z, weight, bias, "none", [], "")
            return out
        return torch.addmm(bias, z, weight.T)

"""Which tensors go to the Triton kernels: those on a GPU, where Triton is installed. Others take PyTorch's operations."""

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


@cache
def has_kernels() -> bool:
    """LLAMA3_SAE_TRITON=0 in the environment keeps them out, to compare or to work around a compiler."""
    if os.environ.get("LLAMA3_SAE_TRITON") == "0":
        return False
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """sae.kernels, if it takes `tensor`."""
    if not tensor.is_cuda or tensor.dtype not in (torch.float32, torch.bfloat16) or not has_kernels():
        return None
    return import_module("sae.kernels")

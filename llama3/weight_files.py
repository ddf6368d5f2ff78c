"""Which reader a file of weights takes."""

from pathlib import Path

from llama3.gguf import is_gguf
from llama3.weights import Safetensors, TorchFile, WeightFile


def open_weights(path: Path) -> WeightFile:
    """Open one `.safetensors`, GGUF or `.pth` file. ValueError where it is damaged or holds something other than weights."""
    if path.suffix == ".safetensors":
        return Safetensors(path)
    if is_gguf(path):
        from llama3.gguf_weights import GgufFile  # the package gguf takes a moment to import

        return GgufFile(path)
    return TorchFile(path)

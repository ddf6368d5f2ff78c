"""The tensors of a GGUF file, dequantised by the package `gguf` a few rows at a time into the model."""

import math
import mmap
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xxhash
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from llama3.gguf import TensorInfo, read_header
from llama3.weights import BLOCK, DTYPES, Entry, Span, copy_mapped, plain_numbers

NUMBERS = 2**20  # dequantised at a time; the package takes several times their memory


class GgufFile:
    """One GGUF file: tensors of plain numbers, and of every type that the package can dequantise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._spans: dict[str, Span] = {}
        for name, info in read_header(path, tokens=False).tensors.items():
            try:
                self._spans[name] = _span(info)
            except NotImplementedError:
                raise ValueError(
                    f"{path}: {name} is {info.type} {list(info.shape)}, which gguf {version('gguf')} cannot dequantise; "
                    "get the model in another quantisation, or update that package"
                ) from None
            # Llamas are trained in bfloat16, so that is the own dtype of a quantised one.
            self.entries[name] = Entry(DTYPES.get(info.type, torch.bfloat16), info.shape)

    def copy_to(self, targets: Mapping[str, Tensor], digest: xxhash.xxh3_64) -> None:
        copy_mapped(self.path, self._spans, targets, digest)


def _span(info: TensorInfo) -> Span:
    """NotImplementedError where the numbers cannot be had."""
    row = info.bytes // info.shape[0]
    end = info.offset + info.bytes
    if info.type in DTYPES:
        return Span(info.offset, end, row, BLOCK, plain_numbers(DTYPES[info.type]))
    if len(info.shape) == 1:
        raise NotImplementedError  # ggml quantises matrices alone
    kind = GGMLQuantizationType[info.type]
    dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    block = NUMBERS * info.bytes // math.prod(info.shape)
    return Span(info.offset, end, row, block, _dequantised(kind, row))


def _dequantised(kind: GGMLQuantizationType, row: int) -> Callable[[mmap.mmap, int, int], Tensor]:
    def decode(mapped: mmap.mmap, begin: int, end: int) -> Tensor:
        data = np.frombuffer(mapped, np.uint8, end - begin, begin).reshape(-1, row)
        with np.errstate(all="ignore"):  # a damaged scale: the model is checked for NaN and infinity afterwards
            return torch.from_numpy(dequantize(data, kind))

    return decode

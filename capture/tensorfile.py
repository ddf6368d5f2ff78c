"""The safetensors format without copies: a file as the pieces it is made of, and where in a file a tensor's bytes lie.

A file is eight bytes with the length of the header (little-endian), the header in JSON, padded with spaces, and the bytes of
all tensors without gaps (https://huggingface.co/docs/safetensors). `safetensors.torch.save` writes the same bytes, but gathers
them in memory first.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Those in use here, in the order that safetensors gives them: wide types first, so that every tensor starts at a multiple of
# its own width.
DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.int8: "I8"}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The file of `tensors` (contiguous, on the CPU), piece by piece; the larger pieces are the tensors' own memory.

    `metadata` of more than one entry would be written in an order of ours, where safetensors' own changes from run to run.
    """
    widest = list(DTYPES)
    names = sorted(tensors, key=lambda name: (widest.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        end = at + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    for name in names:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


class Place(NamedTuple):
    """Where a tensor's bytes lie in its file."""

    start: int
    n_bytes: int

    def read_into(self, path: Path, out: memoryview) -> None:
        """Fill `out`, of `n_bytes` bytes, from the file `path`; ValueError where the file ends before."""
        assert len(out) == self.n_bytes
        at = 0
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while at < len(out):
                n = os.preadv(descriptor, [out[at:]], self.start + at)
                if n == 0:
                    raise ValueError(f"{path}: ends {len(out) - at:,} bytes before its last row; the file is damaged")
                at += n
        finally:
            os.close(descriptor)


def places(path: Path) -> dict[str, Place]:
    """The place of every tensor of a safetensors file. ValueError where the header is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        text = file.read(min(length, MAX_HEADER_BYTES))
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        begin = LENGTH_BYTES + length
        return {name: Place(begin + at, end - at) for name, (at, end) in ((n, t["data_offsets"]) for n, t in header.items())}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None

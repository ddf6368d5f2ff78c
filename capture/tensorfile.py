"""The safetensors format without copies: a file as the pieces it is made of, and where in a file a tensor's bytes lie.

A file is eight bytes with the length of the header (little-endian), the header in JSON, padded with spaces, and the bytes of
all tensors without gaps (https://huggingface.co/docs/safetensors). `safetensors.torch.save` writes the same bytes, but gathers
them in memory first.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from core.text import parse_json

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
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        end = at + tensors[name].nbytes
        entries[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    for name in names:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


class Place(NamedTuple):
    """Where a tensor's bytes lie in its file."""

    start: int
    n_bytes: int


def header(file: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file, read from its beginning. ValueError where there is none."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    found = parse_json(file.read(min(length, MAX_HEADER_BYTES)))
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {type(found).__name__}")
    return found


def places(path: Path) -> dict[str, Place]:
    """The place of every tensor of a safetensors file. ValueError where the header is none."""
    try:
        with path.open("rb") as file:
            tensors = header(file)
            begin = file.tell()
        tensors.pop("__metadata__", None)
        return {name: Place(begin + at, end - at) for name, (at, end) in ((n, t["data_offsets"]) for n, t in tensors.items())}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None

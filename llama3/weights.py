"""Weight files opened without reading them: names, dtypes and shapes first, bytes only once everything fits.

Safetensors are parsed here, because the copy to the device, the hash of the bytes and the release of the mapped pages happen in
one pass, which GGUF files share; Meta's `.pth` go through `torch.load(weights_only=True, mmap=True)`, which refuses a pickle
that runs code.
"""

import math
import mmap
import operator
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import xxhash
from torch import Tensor

from core.text import parse_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Of buffers, and of weights that somebody quantised."""
MAX_HEADER = 8_000_000  # bytes; that of Llama 3.1 405B has some 150 kB, and 100 MB of JSON take minutes and GBs
BLOCK = 64 * 2**20  # bytes copied, hashed and released at a time


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightFile(Protocol):
    """An opened file of weights."""

    path: Path
    entries: dict[str, Entry]

    def copy_to(self, targets: Mapping[str, Tensor], digest: xxhash.xxh3_64) -> None:
        """Copy each tensor named in `targets` there, converted to its device and dtype; feed the file's bytes to `digest`."""


class Span(NamedTuple):
    """Where in its file a tensor lies, and how its bytes become numbers."""

    begin: int
    end: int
    row: int
    """Bytes of one row; 1 or more, a tensor without dimensions is one row."""
    block: int
    """Bytes to read at a time, if a row is not longer than that."""
    decode: Callable[[mmap.mmap, int, int], Tensor]
    """The numbers between two bytes of the file, whole rows of them."""


def copy_mapped(path: Path, spans: Mapping[str, Span], targets: Mapping[str, Tensor], digest: xxhash.xxh3_64) -> None:
    """`WeightFile.copy_to` for a file whose tensors lie one after the other, as `spans` has them: one pass over its bytes."""
    with path.open("rb") as file:
        # A private mapping, never written to: torch warns about buffers that are read-only.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    at = 0
    for name, (begin, end, row, block, decode) in spans.items():
        _hash_block(mapped, at, begin, digest)  # the header, or the gap between two tensors
        step = max(1, block // row) * row
        for here in range(begin, end, step):
            there = min(here + step, end)
            _hash_block(mapped, here, there, digest)
            if (target := targets.get(name)) is not None:
                part = target[(here - begin) // row : (there - begin) // row] if target.ndim else target
                part.copy_(decode(mapped, here, there).view(part.shape))
            _release(mapped, here, there)
        at = end
    _hash_block(mapped, at, len(mapped), digest)


def plain_numbers(dtype: torch.dtype) -> Callable[[mmap.mmap, int, int], Tensor]:
    """Decodes bytes that are the numbers themselves."""

    def decode(mapped: mmap.mmap, begin: int, end: int) -> Tensor:
        source = torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin, offset=begin)
        return (source.clone() if begin % dtype.itemsize else source).view(dtype)  # a view as numbers must be aligned

    return decode


class Safetensors:
    """One file in the safetensors format: 8 bytes of header length, a JSON header, then the bytes of the tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise _damaged(path, f"its header should be {length:,} bytes long, the file has {size:,}")
            header = file.read(length)
        self._start = 8 + length
        self._spans: dict[str, tuple[int, int]] = {}
        self.entries: dict[str, Entry] = {}
        try:
            described = parse_json(header, object_pairs_hook=_unique)
            described.pop("__metadata__", None)
            for name, item in described.items():
                begin, end = map(operator.index, item["data_offsets"])
                self._spans[name] = (begin, end)
                self.entries[name] = Entry(_dtype(item["dtype"]), tuple(map(operator.index, item["shape"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"its header is not valid ({error})") from None
        self._check_spans(size - self._start)

    def _check_spans(self, available: int) -> None:
        """The tensors must fill the rest of the file exactly, without holes or overlaps."""
        self._spans = dict(sorted(self._spans.items(), key=lambda item: item[1]))
        at = 0
        for name, (begin, end) in self._spans.items():
            dtype, shape = self.entries[name]
            if begin != at or end - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                where = f"{name} {list(shape)} should begin at byte {at:,}; its header says {begin:,} to {end:,}"
                raise _damaged(self.path, where)
            at = end
        if at != available:
            raise _damaged(self.path, f"its tensors take {at:,} bytes, {available:,} are there")

    def copy_to(self, targets: Mapping[str, Tensor], digest: xxhash.xxh3_64) -> None:
        spans = {}
        for name, (begin, end) in self._spans.items():
            dtype, shape = self.entries[name]
            row = max(1, math.prod(shape[1:])) * dtype.itemsize
            spans[name] = Span(self._start + begin, self._start + end, row, BLOCK, plain_numbers(dtype))
        copy_mapped(self.path, spans, targets, digest)


class TorchFile:
    """One `.pth` file of Meta's: a dict of tensors in torch's zip format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = {}
        for name, tensor in self._open().items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ValueError(f"{path}: expected a dict of tensors by name; {name!r} is a {type(tensor).__name__}")
            self.entries[name] = Entry(tensor.dtype, tuple(tensor.shape))

    def _open(self) -> dict[str, Tensor]:
        """The tensors, mapped and not read."""
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise ValueError(
                f"{self.path}: refused: its pickle is damaged or asks for more than tensors, and could then run code. "
                "Get the checkpoint from a source you trust, as safetensors if there is one"
            ) from None
        except Exception as error:  # a damaged zip or pickle fails in as many ways as there are bytes
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise ValueError(f"{self.path}: truncated, damaged or no torch file ({reason}); download it again") from None
        if not isinstance(loaded, dict):
            raise ValueError(f"{self.path}: expected a dict of tensors by name, found a {type(loaded).__name__}")
        return loaded

    def copy_to(self, targets: Mapping[str, Tensor], digest: xxhash.xxh3_64) -> None:
        # The largest first, and the file opened anew for each: closing the mapping takes its pages out of memory, so that
        # never more than one tensor lies there twice.
        for name in sorted(set(targets) & set(self.entries), key=lambda name: -math.prod(self.entries[name].shape)):
            targets[name].copy_(self._open()[name])
        with self.path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that is there twice")
    return found


def _dtype(code: str) -> torch.dtype:
    found = (DTYPES | OTHER_DTYPES).get(code)
    if found is None:
        raise ValueError(f"dtype {code!r}, expected one of {', '.join(DTYPES)} and no quantised weights")
    return found


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: truncated or damaged: {why}; copy or download it again")


def _hash_block(mapped: mmap.mmap, begin: int, end: int, digest: xxhash.xxh3_64) -> None:
    with memoryview(mapped) as view, view[begin:end] as block:
        digest.update(block)


def _release(mapped: mmap.mmap, begin: int, end: int) -> None:
    """Take the pages of a block that has been copied out of this process's memory (they stay in the system's file cache)."""
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and end > begin:
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

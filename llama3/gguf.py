"""The header of a GGUF file: metadata, and where each tensor lies. No tensor is read.

The format is that of ggml's `docs/gguf.md`, versions 2 and 3, little-endian. The package `gguf`
reads it too, but makes an array of every token and trusts every length; here each length is
compared with the file before anything is read or allocated.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where `general.alignment` does not say otherwise
MAX_HEADER = 100_000_000  # bytes; that of Llama 3, with 128,000 tokens and 280,000 merges, has 8 million
MAX_ELEMENTS = 2**22  # of one array
MAX_NAME = 256  # characters of a key or of a tensor's name
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Value types of fixed width, as `struct` spells them."""
BOOL, STRING, ARRAY = 7, 8, 9


class TensorInfo(NamedTuple):
    """One tensor of the file."""

    shape: tuple[int, ...]
    """As in PyTorch, the dimension that is contiguous in memory last: `(n_out, n_in)` for a matrix."""
    type: str
    """ggml's name: `F32`, `Q4_1`, `Q6_K`, ..."""
    offset: int
    """First byte, from the beginning of the file."""
    bytes: int


class Header(NamedTuple):
    """What a GGUF file says about itself."""

    metadata: dict[str, Any]
    """Strings, numbers, bools, and lists of one of these, by key."""
    tensors: dict[str, TensorInfo]
    """In the order of the file, which is that of their offsets."""


class Fault(Exception):
    """What is wrong with a header, without the name of its file."""


def is_gguf(path: Path) -> bool:
    """Whether the file begins as GGUF files do; Ollama's have no suffix."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path, tokens: bool = True) -> Header:
    """Metadata and tensors of the GGUF file `path`. Without `tokens` the lists below `tokenizer.` are left out.

    Raises ValueError, one line, for a file that is damaged, cut short, of another version or byte order.
    """
    size = path.stat().st_size
    try:
        if size < 24:
            raise Fault(f"it has {size} bytes, its header alone takes more")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_version(data[:8])
            cursor = Cursor(data, 8, min(size, MAX_HEADER))
            n_tensors = cursor.count("tensors", 32)  # bytes of the shortest description of one
            n_keys = cursor.count("keys", 13)
            metadata = _metadata(cursor, n_keys, tokens)
            tensors = _tensors(cursor, n_tensors)
            return Header(metadata, _placed(tensors, cursor.at, _alignment(metadata), size))
    except Fault as fault:
        raise ValueError(f"{path}: {fault}; copy, download or convert it again") from None


def _check_version(start: bytes) -> None:
    if start[:4] != MAGIC:
        raise Fault(f"is no GGUF file: it begins with {start[:4]!r}, expected {MAGIC!r}")
    little, big = int.from_bytes(start[4:], "little"), int.from_bytes(start[4:], "big")
    if big in VERSIONS:
        raise Fault("is a big-endian GGUF file, expected little-endian")
    if little not in VERSIONS:
        raise Fault(f"is GGUF version {little}, expected {' or '.join(map(str, VERSIONS))}")


class Cursor:
    """Reads values one after the other; Fault, before anything is read, for what would end after byte `end`."""

    def __init__(self, data: mmap.mmap, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def claim(self, what: str, size: int) -> int:
        """Go `size` bytes forward; returns where they begin."""
        begin = self.at
        if size > self.end - begin:
            limit = "as long as a header may be" if self.end == MAX_HEADER else "the end of the file"
            raise Fault(f"truncated or damaged: {what} takes {size:,} bytes from {begin:,} on, {limit} is {self.end:,}")
        self.at += size
        return begin

    def number(self, what: str, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.claim(what, struct.calcsize("<" + code)))[0]

    def count(self, what: str, least: int) -> int:
        """How many of something follow, each of at least `least` bytes."""
        number: int = self.number(f"the number of {what}", "Q")
        if number * least > self.end - self.at:
            raise Fault(f"truncated or damaged: {number:,} {what} do not fit into the {self.end - self.at:,} bytes that follow")
        return number

    def string(self, what: str) -> str:
        length = self.number(f"the length of {what}", "Q")
        begin = self.claim(what, length)
        return _decoded(self.data[begin : self.at], what)

    def name(self, what: str) -> str:
        """A string that messages can show on their one line."""
        name = self.string(what)
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise Fault(f"damaged: {what} is {name[:40]!r}")
        return name

    def value(self, key: str, kind: int, keep: bool) -> Any:
        """The value of `key`; None for a list where not `keep`."""
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            return self.array(key, keep)
        number = self.number(key, _code(key, kind))
        return _truths(key, (number,))[0] if kind == BOOL else number

    def array(self, key: str, keep: bool) -> list[Any] | None:
        kind = self.number(f"the type of {key}", "I")
        code = "Q" if kind == STRING else _code(key, kind)
        count = self.count(f"values of {key}", struct.calcsize("<" + code))
        if count > MAX_ELEMENTS:
            raise Fault(f"damaged: {key} has {count:,} values, at most {MAX_ELEMENTS:,} are read")
        if kind == STRING:
            return self.strings(key, count, keep)
        begin = self.claim(key, count * struct.calcsize("<" + code))
        if not keep:
            return None
        numbers = struct.unpack_from(f"<{count}{code}", self.data, begin)
        return _truths(key, numbers) if kind == BOOL else list(numbers)

    def strings(self, key: str, count: int, keep: bool) -> list[str] | None:
        """Like `string`, `count` times, without a call for each of some 100,000."""
        data, at, end = self.data, self.at, self.end
        found: list[bytes] = []
        for index in range(count):
            begin = at + 8
            at = begin + int.from_bytes(data[at:begin], "little")
            if at > end:
                raise Fault(f"truncated or damaged: {key}[{index}] ends at byte {at:,}, after {end:,}")
            if keep:
                found.append(data[begin:at])
        self.at = at
        return [_decoded(text, f"{key}[{index}]") for index, text in enumerate(found)] if keep else None


def _code(key: str, kind: int) -> str:
    if kind not in SCALARS:
        what = "a list of lists" if kind == ARRAY else f"of type {kind}, which GGUF does not have"
        raise Fault(f"damaged: {key} is {what}")
    return SCALARS[kind]


def _decoded(text: bytes, what: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise Fault(f"damaged: {what} is not valid UTF-8") from None


def _truths(key: str, numbers: tuple[int, ...]) -> list[bool]:
    if wrong := set(numbers) - {0, 1}:
        raise Fault(f"damaged: {key} is a bool and has the value {min(wrong)}")
    return [number == 1 for number in numbers]


def _metadata(cursor: Cursor, count: int, tokens: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index in range(count):
        key = cursor.name(f"the name of key {index}")
        if key in found:
            raise Fault(f"damaged: the key {key} is there twice")
        kind = cursor.number(f"the type of {key}", "I")
        found[key] = cursor.value(key, kind, tokens or not key.startswith("tokenizer."))
    return {key: value for key, value in found.items() if value is not None}


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise Fault(f"damaged: general.alignment is {alignment!r}, expected a power of two")
    return alignment


def _tensors(cursor: Cursor, count: int) -> dict[str, TensorInfo]:
    """The descriptions of the tensors; `offset` counts from the first tensor on, as the file has it."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}
    found: dict[str, TensorInfo] = {}
    for index in range(count):
        name = cursor.name(f"the name of tensor {index}")
        if name in found:
            raise Fault(f"damaged: the tensor {name} is there twice")
        n_dims = cursor.number(f"the shape of {name}", "I")
        if not 1 <= n_dims <= 4:
            raise Fault(f"damaged: {name} has {n_dims} dimensions, expected 1 to 4")
        shape = tuple(cursor.number(f"the shape of {name}", "Q") for _ in range(n_dims))
        kind = cursor.number(f"the type of {name}", "I")
        if kind not in sizes:
            raise Fault(f"{name} has ggml type {kind}, which the installed package gguf does not know")
        type_name, block, block_bytes = sizes[kind]
        if min(shape) < 1 or shape[0] % block:
            raise Fault(f"damaged: {name} is {type_name} of shape {list(shape[::-1])}, expected rows of {block} n values")
        size = math.prod(shape) // block * block_bytes
        found[name] = TensorInfo(shape[::-1], type_name, cursor.number(f"the offset of {name}", "Q"), size)
    return found


def _placed(tensors: dict[str, TensorInfo], at: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    """With offsets from the beginning of the file.

    Each tensor must begin where the one before ends, rounded up to `alignment`, as in ggml's reader;
    so none overlaps another and none lies outside the file.
    """
    start = expected = -(-at // alignment) * alignment
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        offset = start + info.offset
        if offset != expected:
            raise Fault(f"damaged: {name} should begin at byte {expected:,}, its header says {offset:,}")
        if offset + info.bytes > size:
            raise Fault(f"truncated or damaged: {name} ends at byte {offset + info.bytes:,}, the file has {size:,}")
        found[name] = info._replace(offset=offset)
        expected = -(-(offset + info.bytes) // alignment) * alignment
    return found

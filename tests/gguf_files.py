"""GGUF files written byte by byte, so that tests can also write wrong ones."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "B", UINT64: "Q", 11: "q", 12: "d"}


class Typed(NamedTuple):
    """A value of metadata with a type that its Python type does not tell: a number's width, or a list of `kind`."""

    kind: int
    value: Any


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def payload(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + CODES[kind], value)


def field(key: str | bytes, value: Any) -> bytes:
    """One key with its value: an int is a uint32, a float a float32."""
    if isinstance(value, bytes):  # type and value as they are
        return text(key) + value
    if not isinstance(value, Typed):
        kinds = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING}
        value = Typed(STRING, value) if isinstance(value, list) else Typed(kinds[type(value)], value)
    if isinstance(value.value, list):
        values = b"".join(payload(value.kind, item) for item in value.value)
        return text(key) + struct.pack("<IIQ", ARRAY, value.kind, len(value.value)) + values
    return text(key) + struct.pack("<I", value.kind) + payload(value.kind, value.value)


class Stored(NamedTuple):
    """A tensor as the file describes it; `shape` as in PyTorch. `offset` None: where it belongs."""

    name: str | bytes
    shape: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


def gguf_bytes(
    metadata: Sequence[tuple[str | bytes, Any]],
    tensors: Sequence[Stored] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file. `counts` (tensors, keys) other than the true ones, for files that lie."""
    n_tensors, n_keys = counts or (len(tensors), len(metadata))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(field(*item) for item in metadata)
    data = b""
    for tensor in tensors:
        offset = len(data) if tensor.offset is None else tensor.offset
        head += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1]) + struct.pack("<IQ", tensor.kind, offset)
        data += tensor.data + bytes(-len(tensor.data) % alignment)
    return head + bytes(-len(head) % alignment) + data


def write(path: Path, *args: Any, **options: Any) -> Path:
    path.write_bytes(gguf_bytes(*args, **options))
    return path

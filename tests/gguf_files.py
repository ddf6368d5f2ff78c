"""GGUF files written byte by byte, so that tests can also write wrong ones."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch

from llama3 import ModelArgs, Transformer

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


GGML_NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "attention_norm": "attn_norm", "attention.wq": "attn_q",
    "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
}  # fmt: skip


def ggml_name(name: str) -> str:
    """What ggml calls a tensor of Meta's layout."""
    stem = name.removesuffix(".weight")
    prefix, _, rest = stem.partition("layers.")
    layer, _, rest = rest.partition(".") if not prefix else ("", "", stem)
    return (f"blk.{layer}." if layer else "") + GGML_NAMES.get(rest, rest) + ".weight"


def llama_metadata(args: ModelArgs) -> dict[str, Any]:
    """As llama.cpp's converter writes it."""
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.block_count": args.n_layers,
        "llama.context_length": args.max_seq_len,
        "llama.embedding_length": args.dim,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.rope.freq_base": args.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.vocab_size": args.vocab_size,
        "llama.rope.dimension_count": args.head_dim,
    }


def stored(name: str, weight: torch.Tensor, kind: str = "F32") -> Stored:
    """A tensor as ggml's quantiser stores it; what has one dimension stays float32."""
    kind = kind if weight.ndim > 1 else "F32"
    number = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(weight.detach().float().numpy(), number)
    return Stored(name, tuple(weight.shape), int(number), data.tobytes())


def llama_gguf(path: Path, model: Transformer, kind: str = "F32", extra: Sequence[Stored] = (), **changes: Any) -> Path:
    """`model` as a GGUF file of matrices of type `kind`. `changes` to its metadata are written `llama__block_count=3`; None
    leaves a key out."""
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in (llama_metadata(model.params) | keys).items() if value is not None}
    tensors = [stored(ggml_name(name), weight, kind) for name, weight in model.named_parameters()]
    return write(path, list(metadata.items()), [*tensors, *extra])

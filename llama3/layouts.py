"""Checkpoint layouts of Meta, Hugging Face and ggml: which files there are, and where each of their
tensors belongs in the model.

Shapes: H heads, K head_dim, D model width.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from llama3.args import ModelArgs
from llama3.gguf import Header, read_header

HF_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
GGUF_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}
ROPE_TABLES = ("rope.freqs", "rope_freqs.weight")
"""Tensors that hold no weights: what they say is in `ModelArgs`."""


class Layout(NamedTuple):
    """A checkpoint on disk, nothing of it read but its description."""

    args: ModelArgs
    files: list[Path]
    kind: Literal["Meta", "Hugging Face", "GGUF"]

    def parameter(self, name: str) -> str | None:
        """The model's name of the tensor that a file calls `name`; None for tables that are computed anew."""
        if name in ROPE_TABLES or name.endswith(".rotary_emb.inv_freq"):
            return None
        if self.kind == "Meta":
            return name
        stem, _, kind = name.rpartition(".")
        names, layers = (GGUF_NAMES, r"blk") if self.kind == "GGUF" else (HF_NAMES, r"model\.layers")
        layer = re.fullmatch(rf"{layers}\.(\d+)\.(.+)", stem)
        if layer:
            return f"layers.{layer[1]}.{names.get(layer[2], layer[2])}.{kind}"
        return f"{names.get(stem, stem)}.{kind}"

    @property
    def place(self) -> Path:
        """What messages call it: the file where there is one alone, else the folder."""
        return self.files[0] if self.kind == "GGUF" else self.files[0].parent


def find_layout(place: Path) -> Layout:
    """Recognise the layout of a folder, or of a GGUF file; ValueError where it has none, or where files are missing."""
    return _gguf_layout(place) if place.is_file() else _folder_layout(place)


def _folder_layout(folder: Path) -> Layout:
    if (folder / "params.json").is_file():
        return Layout(ModelArgs.from_params(read_json(folder / "params.json")), _meta_files(folder), "Meta")
    if (folder / "config.json").is_file():
        return Layout(ModelArgs.from_hf_config(read_json(folder / "config.json")), _hf_files(folder), "Hugging Face")
    if (folder / "original" / "params.json").is_file():
        return _folder_layout(folder / "original")
    found = sorted(p.name for p in folder.iterdir())[:4] if folder.is_dir() else []
    raise ValueError(
        f"{folder}: expected a checkpoint: params.json with consolidated.*.pth (Meta), or config.json with *.safetensors "
        f"(Hugging Face), or a .gguf file itself; found {', '.join(found) or 'nothing'}"
    )


def _gguf_layout(file: Path) -> Layout:
    header = read_header(file, tokens=False)
    parts = header.metadata.get("split.count", 0)
    kind = header.metadata.get("general.type", "model")
    try:
        if parts not in (0, 1):
            raise ValueError(f"is one of {parts} parts; join them with llama.cpp's llama-gguf-split --merge")
        if kind != "model":
            raise ValueError(f"general.type is {kind!r}, expected 'model'")
        if (embedding := header.tensors.get("token_embd.weight")) is None:
            raise ValueError("holds no token_embd.weight: a vocabulary without a model")
        tied, divisors = "output.weight" not in header.tensors, _rope_divisors(file, header)
        return Layout(ModelArgs.from_gguf(header.metadata, embedding.shape[0], tied, divisors), [file], "GGUF")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _rope_divisors(file: Path, header: Header) -> tuple[float, ...]:
    info = header.tensors.get("rope_freqs.weight")
    if info is None:
        return ()
    if info.type != "F32" or len(info.shape) > 1 or info.bytes > 2**20:
        raise ValueError(f"rope_freqs.weight is {info.type} {list(info.shape)}, expected a short list of F32")
    return tuple(map(float, np.fromfile(file, "<f4", info.bytes // 4, offset=info.offset)))


def _meta_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated*.safetensors")) or sorted(folder.glob("consolidated*.pth"))
    if not files:
        raise ValueError(f"{folder}: holds params.json but neither consolidated*.safetensors nor consolidated.*.pth")
    numbers = [int(match[1]) for file in files if (match := re.search(r"\.(\d+)\.", file.name))]
    missing = sorted(set(range(len(files))) - set(numbers))
    if numbers and missing:
        raise ValueError(f"{folder}: shard {missing[0]:02d} is missing; found {', '.join(file.name for file in files)}")
    return files


def _hf_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index}: expected a 'weight_map' from tensor to file")
        files = sorted({folder / name for name in names.values()})
        if outside := [file for file in files if file.parent != folder]:
            raise ValueError(f"{index}: names a file outside its folder: {outside[0]}")
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{folder}: {len(missing)} of {len(files)} shards missing; the first is {missing[0]}")
        return files
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder}: holds config.json but neither model.safetensors nor model.safetensors.index.json")
    return [file]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError naming the file where it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(data).__name__}")
    return data


def interleave_(weight: Tensor, head_dim: int) -> None:
    """Reorder the rows of `wq` or `wk` (H * K, D), in place, from Hugging Face's RoPE convention to Meta's.

    There element i of a head rotates with i + K/2 (`rotate_half`), here 2i with 2i + 1: the same rotation of renamed rows.
    """
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])  # (H, 2, K/2, D)
    weight.copy_(halves.transpose(1, 2).reshape(weight.shape))

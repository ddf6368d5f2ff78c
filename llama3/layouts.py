"""Meta's and Hugging Face's checkpoint layouts: which files there are, and where each of their tensors belongs in the model.

Shapes: H heads, K head_dim, D model width.
"""

import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from core.text import read_json
from llama3.args import ModelArgs

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


class Layout(NamedTuple):
    """A checkpoint on disk, nothing of it read but its description."""

    args: ModelArgs
    files: list[Path]
    hugging_face: bool

    def parameter(self, name: str) -> str | None:
        """The model's name of the tensor that a file calls `name`; None for tables that are computed anew."""
        if name == "rope.freqs" or name.endswith(".rotary_emb.inv_freq"):
            return None
        if not self.hugging_face:
            return name
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        if layer:
            return f"layers.{layer[1]}.{HF_NAMES.get(layer[2], layer[2])}.{kind}"
        return f"{HF_NAMES.get(stem, stem)}.{kind}"


def find_layout(folder: Path) -> Layout:
    """Recognise the layout of `folder`; ValueError where it has neither, or where files are missing."""
    if (folder / "params.json").is_file():
        return Layout(ModelArgs.from_params(read_json(folder / "params.json")), _meta_files(folder), False)
    if (folder / "config.json").is_file():
        return Layout(ModelArgs.from_hf_config(read_json(folder / "config.json")), _hf_files(folder), True)
    if (folder / "original" / "params.json").is_file():
        return find_layout(folder / "original")
    found = sorted(p.name for p in folder.iterdir())[:4] if folder.is_dir() else []
    raise ValueError(
        f"{folder}: expected a checkpoint: params.json with consolidated.*.pth (Meta), or config.json with *.safetensors "
        f"(Hugging Face); found {', '.join(found) or 'nothing'}"
    )


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


def interleave_(weight: Tensor, head_dim: int) -> None:
    """Reorder the rows of `wq` or `wk` (H * K, D), in place, from Hugging Face's RoPE convention to Meta's.

    There element i of a head rotates with i + K/2 (`rotate_half`), here 2i with 2i + 1: the same rotation of renamed rows.
    """
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])  # (H, 2, K/2, D)
    weight.copy_(halves.transpose(1, 2).reshape(weight.shape))

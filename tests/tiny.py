"""A random tiny Llama on disk, in Meta's layout, with a tokenizer of its own: what most tests run on."""

import base64
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llama3.args import ModelArgs
from llama3.model import Transformer
from llama3.tokenizer import N_SPECIAL_TOKENS

MERGES = (b" t", b"he", b" a", b"in", b" the", b"er", b"on", b" s", b"re", b" w", b"or", b"ing")


def tiny_tokenizer(folder: Path) -> int:
    """Write a `tokenizer.model` of single bytes and a few merges; returns the vocabulary size, special tokens included."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [bytes([b]) for b in range(256)] + list(_closed(MERGES))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return len(ranks) + N_SPECIAL_TOKENS


def _closed(merges: tuple[bytes, ...]) -> list[bytes]:
    """Each merge after the two-byte pieces it is built from, so that BPE can reach it."""
    out: list[bytes] = []
    for token in merges:
        for end in range(2, len(token) + 1):
            if token[:end] not in out:
                out.append(token[:end])
    return out


def tiny_args(**overrides: Any) -> ModelArgs:
    shape: dict[str, Any] = {
        "dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 0, "multiple_of": 16, "max_seq_len": 128,
        "rope_theta": 10_000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    return ModelArgs(**(shape | overrides))


def tiny_llama(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write params.json, consolidated.safetensors and tokenizer.model with random weights; returns `folder`."""
    args = tiny_args(**({"vocab_size": tiny_tokenizer(folder)} | overrides))
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(args)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "consolidated.safetensors")
    params = {k: v for k, v in asdict(args).items() if k != "rope_scaling"}
    (folder / "params.json").write_text(json.dumps(params))
    return folder

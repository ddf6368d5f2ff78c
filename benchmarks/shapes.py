"""Sizes of the Llama family, and models of random weights: speed does not depend on what the weights are."""

import torch

from llama3 import ModelArgs, RopeScaling, Transformer

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024},
    "embedded": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192},
    "smollm": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""In the words of transformers' configurations."""


def args_of(shape: str) -> ModelArgs:
    """A shape in the terms of our model, with the scaled RoPE and the tied head of Llama 3.2."""
    s = SHAPES[shape]
    return ModelArgs(
        dim=s["hidden_size"], hidden_dim=s["intermediate_size"], n_layers=s["num_hidden_layers"], vocab_size=s["vocab_size"],
        n_heads=s["num_attention_heads"], n_kv_heads=s["num_key_value_heads"], rope_scaling=RopeScaling(factor=32.0),
        tie_word_embeddings=True,
    )  # fmt: skip


@torch.no_grad()
def random_model(shape: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model of random weights on `device`, without gradients."""
    with torch.device("meta"):
        model = Transformer(args_of(shape))
    model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model

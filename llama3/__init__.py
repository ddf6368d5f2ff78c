"""Llama 3 in plain PyTorch: model, tokenizer, chat format, checkpoints, hook sites, generation.

Knows no SAE, no rank and no stage; everything else in this repository stands on it.
"""

# isort: off
import core  # before PyTorch: it says how OpenMP's threads wait  # noqa: F401
# isort: on

from llama3.args import ModelArgs, RopeScaling
from llama3.cache import KVCache
from llama3.chat import encode_dialog
from llama3.chat_format import Message
from llama3.checkpoint import load_model, load_tokenizer
from llama3.generate import Piece, Sampling, complete, generate
from llama3.model import Transformer
from llama3.tokenizer import Tokenizer

__all__ = [
    "KVCache",
    "Message",
    "ModelArgs",
    "Piece",
    "RopeScaling",
    "Sampling",
    "Tokenizer",
    "Transformer",
    "complete",
    "encode_dialog",
    "generate",
    "load_model",
    "load_tokenizer",
]

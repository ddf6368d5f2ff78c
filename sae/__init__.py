"""Sparse autoencoders: model, preprocessing, training, evaluation."""

from importlib import import_module
from typing import Any

__all__ = ["SAE", "Latents", "Normalised", "SAEConfig", "load"]


def __getattr__(name: str) -> Any:
    """The names of sae.model, loaded when they are asked for (PEP 562): names and flags must not cost the import of torch."""
    if name in __all__:
        return getattr(import_module("sae.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Sparse autoencoders: model, preprocessing, training, evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.model import SAE, Latents, Normalised, SAEConfig, load

__all__ = ["SAE", "Latents", "Normalised", "SAEConfig", "load"]


def __getattr__(name: str) -> Any:
    """The public names, loaded when asked for (PEP 562): flags and registries need no torch."""
    if name in __all__:
        return getattr(import_module("sae.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

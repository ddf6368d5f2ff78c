"""Sparse autoencoders: model, preprocessing, training, evaluation."""

# isort: off
import core.ending  # before everything else: signals during the imports of a stage  # noqa: F401
# isort: on

from typing import TYPE_CHECKING

from core import lazy_exports

__all__ = ["SAE", "Latents", "Normalised", "SAEConfig", "load"]

if TYPE_CHECKING:
    from sae.loading import load
    from sae.model import SAE, Latents, Normalised, SAEConfig
else:
    __getattr__, __dir__ = lazy_exports(
        __name__, {"sae.loading": ("load",), "sae.model": ("SAE", "Latents", "Normalised", "SAEConfig")}
    )

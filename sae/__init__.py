"""Sparse autoencoders: model, preprocessing, training, evaluation."""

import core.ending  # before everything else: signals during the imports of a stage  # noqa: F401
from sae.model import SAE, Latents, Normalised, SAEConfig, load

__all__ = ["SAE", "Latents", "Normalised", "SAEConfig", "load"]

"""Sparse autoencoders: model, preprocessing, training, evaluation."""

from sae.model import SAE, Latents, Normalised, SAEConfig, load

__all__ = ["SAE", "Latents", "Normalised", "SAEConfig", "load"]

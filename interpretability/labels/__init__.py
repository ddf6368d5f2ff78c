"""Titles and explanations of latents, from token statistics or from a language model."""

"""What decides, besides the weights, what an SAE computes."""

from dataclasses import dataclass, field
from typing import Any

from sae import architectures

NORMS = ("dataset", "layer", "none")
SMALLEST_FACTOR = 1e-30  # of a scale: what is multiplied with it or divided by it stays within float32


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What decides, besides the weights, what an SAE computes, and where it came from; lies beside
    them as `cfg.json`.
    """

    d_model: int
    n_latents: int
    k: int
    """Active latents per row: at most or on average, as its architecture says; as measured in
    training where that sets none.
    """
    architecture: str = "topk"
    """A module of sae.architectures."""
    prefixes: tuple[int, ...] = ()
    """matryoshka: the numbers of latents that were trained to reconstruct on their own, the last of
    them all.
    """
    norm: str = "dataset"
    """dataset: z = x * scale; layer: z = (x - mean(x)) / (std(x) + norm_eps) per row, unbiased std;
    none: z = x.
    """
    scale: float = 1.0
    """sqrt(d) / E||x|| over the training rows for `dataset`; 1 otherwise."""
    norm_eps: float = 1e-6
    """Added to the standard deviation by `layer`, in units of x."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Model, tokenizer, site, corpus, BOS policy and dtype of the activations, statistics, and the
    training's length.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", tuple(self.prefixes))  # a list where it comes from JSON
        if self.architecture not in architectures.names():
            expected = ", ".join(architectures.names())
            raise ValueError(f"architecture {self.architecture!r} is not known; expected one of {expected}")
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is not known; expected dataset, layer or none")
        if not 1 <= self.k <= self.n_latents:
            raise ValueError(f"k must be between 1 and the number of latents, {self.n_latents}; found {self.k}; lower --k")
        for name in ("scale", "norm_eps"):
            if not SMALLEST_FACTOR <= (found := getattr(self, name)) <= 1 / SMALLEST_FACTOR:
                raise ValueError(f"{name} must lie between {SMALLEST_FACTOR:g} and {1 / SMALLEST_FACTOR:g}; found {found}")

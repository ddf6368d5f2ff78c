"""The figures of an evaluation: what each is, in words and from the sums. docs/metrics.md explains them.

Shapes: R resamples (1 for the figures themselves), n latents, d model width.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.accumulator import Accumulator
from sae.config import SAEConfig
from sae.evaluating.bootstrap import intervals, whole
from sae.evaluating.weights import WeightFigures

OFTEN, VERY_OFTEN = 0.01, 0.1  # of the tokens; SAEBench's limits
DENSITY_EDGES = tuple(-7 + i / 4 for i in range(29))  # log10 of a density; what lies outside counts at the ends

DEFINITIONS = {
    "fvu": "sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 over all tokens evaluated, mean(x) of each dimension over the same",
    "explained_variance": "1 - fvu",
    "explained_variance_legacy": "mean over tokens of 1 - ||x - x_hat||^2 / ||x - mean of its batch||^2 (SAELens' old formula)",
    "fvu_mean": "fvu where x_hat is the mean of x over other sentences",
    "fvu_pca": "fvu of PCA fitted on other sentences, with as many components as the SAE has active latents",
    "fvu_random_sae": "fvu of an SAE of this shape with random tied rows, of the norm at which such rows reconstruct best",
    "l0": "active latents per token: mean, 10th and 90th percentile",
    "l1": "mean of the sum of a token's latents, in units of z",
    "dead_fraction": "share of latents that fire at none of the tokens evaluated",
    "over_1_percent": "share of latents that fire at more than 1 % of the tokens",
    "over_10_percent": "share of latents that fire at more than 10 % of the tokens",
    "firing_over_1_percent": "share of all firing that comes from latents over 1 %",
    "firing_over_10_percent": "share of all firing that comes from latents over 10 %",
    "density": "median share of tokens at which a latent fires that fires at all; histogram of log10, ends included",
    "cosine": "mean of x . x_hat / (||x|| ||x_hat||)",
    "norm": "mean of ||x||",
    "norm_hat": "mean of ||x_hat||",
    "l2_ratio": "mean of ||x_hat|| / ||x||",
    "relative_reconstruction_bias": "mean ||x_hat||^2 / mean(x . x_hat); 1 is unbiased (Gated SAE, eq. 10)",
    "mse": "mean of ||x - x_hat||^2, summed over dimensions",
    "ce_clean": "cross-entropy of the model with x as it is, nats per token",
    "ce_sae": "cross-entropy of the model with x_hat for x, nats per token",
    "ce_zero": "cross-entropy of the model with 0 for x, nats per token",
    "ce_mean": "cross-entropy of the model with the mean for x, nats per token",
    "ce_recovered": "(ce_zero - ce_sae) / (ce_zero - ce_clean)",
    "ce_recovered_mean": "(ce_mean - ce_sae) / (ce_mean - ce_clean)",
    "kl": "mean KL(clean || x_hat for x) over the vocabulary, nats per token",
    "kl_zero": "mean KL(clean || 0 for x) over the vocabulary, nats per token",
    "kl_mean": "mean KL(clean || the mean for x) over the vocabulary, nats per token",
    "encoder_decoder_cosine": "mean over latents of the cosine of encoder and decoder row",
    "max_decoder_cosine": "mean over latents of the largest cosine with another latent's decoder row",
    "max_encoder_cosine": "mean over latents of the largest cosine with another latent's encoder row",
}
NO_INTERVAL = ("dead_fraction", "l0_p10", "l0_p90")
"""A resample holds fewer different documents, so that more latents are silent in it; and percentiles of counts are counts."""


class Figure(NamedTuple):
    """A number, with a 95 % interval where there is one."""

    value: float
    interval: tuple[float, float] | None = None

    def record(self) -> dict[str, Any]:
        """As JSON: what does not exist (0 / 0) is null."""
        return {"value": self.value if math.isfinite(self.value) else None, "interval": self.interval}


def measures(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Figures [R] from sums [R, ...] in float64: those of the reconstruction, of latents where there are, of the model where it
    ran.
    """
    n, spread = sums["tokens"], sums["x_squared"] - sums["x"].square().sum(1) / sums["tokens"]
    fvu = sums["residual"] / spread.where(spread > 0, 0)
    found = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "explained_variance_legacy": sums["explained_legacy"] / sums["tokens_legacy"],
        "mse": sums["residual"] / n,
        "cosine": sums["cosine"] / n,
        "norm": sums["norm"] / n,
        "norm_hat": sums["norm_hat"] / n,
        "l2_ratio": sums["l2_ratio"] / n,
        "relative_reconstruction_bias": sums["norm_hat_squared"] / sums["dot"],
    }
    if "fired" in sums:
        found |= _of_latents(sums)
    return found | _of_the_model(sums)


def _of_latents(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    histogram, fired, n = sums["l0"], sums["fired"], sums["tokens"]
    density, firings = fired / n[:, None], fired.sum(1)
    counts = torch.arange(histogram.shape[1], dtype=torch.float64)
    found = {
        "l0": histogram @ counts / n,
        "l0_p10": _quantile(histogram, 0.1),
        "l0_p90": _quantile(histogram, 0.9),
        "l1": sums["l1"] / n,
        "dead_fraction": (fired == 0).double().mean(1),
        "density": density.where(density > 0, torch.nan).nanmedian(1).values,
    }
    for name, limit in (("1", OFTEN), ("10", VERY_OFTEN)):
        found[f"over_{name}_percent"] = (density > limit).double().mean(1)
        found[f"firing_over_{name}_percent"] = fired.where(density > limit, 0).sum(1) / firings
    return found


def _quantile(histogram: Tensor, share: float) -> Tensor:
    """The smallest count that at least `share` of the tokens do not exceed, [R] of histograms [R, K + 1]."""
    below = histogram.cumsum(1)
    return (below < (share * below[:, -1:]).ceil()).sum(1).double()


def _of_the_model(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Nothing where the model did not run."""
    if "targets" not in sums:
        return {}
    found = {}
    for name in ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl_zero", "kl_mean"):
        if name in sums:
            found[name] = sums[name] / sums["targets"]
    if "ce_sae" in sums:
        for ablation, name in (("zero", "ce_recovered"), ("mean", "ce_recovered_mean")):
            ablated = sums[f"ce_{ablation}"]
            found[name] = (ablated - sums["ce_sae"]) / (ablated - sums["ce_clean"])
        found["kl"] = sums["kl_sae"] / sums["targets"]
    return found


def figures_of(accumulated: Accumulator, resamples: int, seed: int) -> dict[str, Figure]:
    """All figures of one contender, with their intervals."""
    sums = {name: value for name, value in accumulated.sums.items() if name != "fired_sentences"}
    found = {name: float(value) for name, value in measures(whole(sums)).items()}
    bounds = intervals(sums, measures, resamples, seed)
    return {name: Figure(value, None if name in NO_INTERVAL else bounds[name]) for name, value in found.items()}


def of_weights(found: WeightFigures) -> dict[str, Figure]:
    """Means over the latents: no token is looked at, so there is nothing to resample."""
    return {
        "encoder_decoder_cosine": Figure(float(found.encoder_decoder_cosine.mean())),
        "max_decoder_cosine": Figure(float(found.max_decoder_cosine.mean())),
        "max_encoder_cosine": Figure(float(found.max_encoder_cosine.mean())),
    }


def described(
    found: Mapping[str, Figure], accumulated: Accumulator, cfg: SAEConfig, conditions: dict[str, Any]
) -> dict[str, Any]:
    """Each figure of an SAE as `{"value", "interval", "definition", "conditions"}` and what else belongs to it."""
    more: dict[str, dict[str, Any]] = {
        "l0": {"p10": found["l0_p10"].value, "p90": found["l0_p90"].value, "k": cfg.k},
        "dead_fraction": {"n_latents": cfg.n_latents, "window_tokens": accumulated.tokens},
        "density": {"log10_edges": list(DENSITY_EDGES), "latents": density_histogram(accumulated)},
        "fvu_pca": {"components": min(cfg.k, cfg.d_model)},
    }
    return {
        name: found[name].record() | {"definition": definition, "conditions": conditions} | more.get(name, {})
        for name, definition in DEFINITIONS.items()
        if name in found
    }


def density_histogram(accumulated: Accumulator) -> list[int]:
    """Latents that fire at all, by log10 of their density, between `DENSITY_EDGES`."""
    fired = accumulated.firing_counts
    log_density = (fired[fired > 0].double() / accumulated.tokens).log10()
    edges = torch.tensor(DENSITY_EDGES[1:-1], dtype=torch.float64)
    counts: list[int] = torch.bincount(torch.bucketize(log_density, edges, right=True), minlength=len(edges) + 1).tolist()
    return counts

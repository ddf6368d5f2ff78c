"""What an evaluation compares an SAE with, and how it is written down.

Shapes: N tokens, d model width, n latents.
"""

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from sae.accumulator import Accumulator, Covariance
from sae.model import SAE, SAEConfig


@dataclass(frozen=True)
class Baselines:
    """What any SAE should beat; fitted on other sentences than those evaluated."""

    mean: Tensor
    """Of x, [d], float32."""
    components: Tensor
    """As many principal components as the SAE has active latents, orthonormal columns [d, min(k, d)], float32."""
    random_sae: SAE
    """The SAE's shape, norm and b_pre with random unit rows, the same in encoder and decoder."""

    def residuals(self, x: Tensor) -> dict[str, Tensor]:
        """`x - x_hat` [N, d] of each baseline for rows `x` [N, d]."""
        centred = x - self.mean
        return {
            "residual_mean": centred,
            "residual_pca": centred - (centred @ self.components) @ self.components.T,
            "residual_random_sae": x - self.random_sae(x),
        }


def baselines(sae: SAE, fitted: Covariance, seed: int) -> Baselines:
    """Baselines for `sae`; `fitted` are the mean and covariance of x over the sentences to fit on."""
    cfg = sae.cfg
    shape = SAEConfig(d_model=cfg.d_model, n_latents=cfg.n_latents, k=cfg.k)
    random_sae = SAE(replace(shape, norm=cfg.norm, scale=cfg.scale, norm_eps=cfg.norm_eps))
    random_sae.initialise_("tied", torch.Generator().manual_seed(seed))
    random_sae = random_sae.to(sae.W_enc).requires_grad_(False)
    random_sae.b_pre.copy_(sae.b_pre)
    mean, components = fitted.mean.to(sae.W_enc), fitted.components(sae.cfg.k).to(sae.W_enc)
    return Baselines(mean, components, random_sae)


def figures(accumulated: Accumulator, cfg: SAEConfig, conditions: dict[str, Any]) -> dict[str, Any]:
    """Each figure as `{"value", "definition", "conditions"}`; a value that does not exist (0 / 0) is null."""
    found: dict[str, Any] = {}

    def add(name: str, value: float, definition: str, **more: Any) -> None:
        shown = value if math.isfinite(value) else None
        found[name] = {"value": shown, "definition": definition, "conditions": conditions} | more

    fvu, n, targets = accumulated.fvu(), accumulated.tokens, accumulated.targets
    add("fvu", fvu, "sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 over all tokens evaluated")
    add("explained_variance", 1 - fvu, "1 - fvu")
    add("fvu_mean", accumulated.fvu("residual_mean"), "fvu where x_hat is the mean of x over other sentences")
    add("fvu_pca", accumulated.fvu("residual_pca"), "fvu of PCA fitted on other sentences", components=min(cfg.k, cfg.d_model))
    add("fvu_random_sae", accumulated.fvu("residual_random_sae"), "fvu of an SAE of this shape with random tied unit rows")
    percentiles = {"p10": accumulated.l0_quantile(0.1), "p90": accumulated.l0_quantile(0.9)}
    add("l0", _mean_l0(accumulated), "active latents per token: mean, 10th and 90th percentile", **percentiles, k=cfg.k)
    dead = float((accumulated.firing_counts == 0).double().mean())
    add("dead_fraction", dead, "share of latents that fire at none of the tokens evaluated", n_latents=cfg.n_latents)
    add("cosine", accumulated.mean("cosine", n), "mean of x . x_hat / (||x|| ||x_hat||)")
    add("l2_ratio", accumulated.mean("l2_ratio", n), "mean of ||x_hat|| / ||x||")
    bias = accumulated.sums["norm_hat_squared"] / accumulated.sums["dot"] if accumulated.sums["dot"] else math.nan
    add("relative_reconstruction_bias", bias, "mean ||x_hat||^2 / mean(x . x_hat); 1 is unbiased (Gated SAE, eq. 10)")
    for name, what in (("clean", "x as it is"), ("sae", "x_hat for x"), ("zero", "0 for x"), ("mean", "the mean for x")):
        add(f"ce_{name}", accumulated.mean(f"ce_{name}", targets), f"cross-entropy of the model with {what}, nats per token")
    add("ce_recovered", accumulated.recovered("zero"), "(ce_zero - ce_sae) / (ce_zero - ce_clean)")
    add("ce_recovered_mean", accumulated.recovered("mean"), "(ce_mean - ce_sae) / (ce_mean - ce_clean)")
    for name, key in (("sae", "kl"), ("zero", "kl_zero"), ("mean", "kl_mean")):
        add(key, accumulated.mean(f"kl_{name}", targets), f"mean KL(clean || {name}) over the vocabulary, nats per token")
    return found


def _mean_l0(accumulated: Accumulator) -> float:
    histogram = accumulated.l0_histogram
    return float((histogram * torch.arange(len(histogram))).sum() / histogram.sum())


def markdown(found: dict[str, Any]) -> str:
    """The figures as a page."""
    conditions = next(iter(found.values()))["conditions"]
    lines = ["# Evaluation of a sparse autoencoder", "", "| figure | value | definition |", "|---|---|---|"]
    for name, figure in found.items():
        value = "none" if figure["value"] is None else f"{figure['value']:.4f}"
        more = [f"{key} {figure[key]}" for key in figure if key not in ("value", "definition", "conditions")]
        definition = figure["definition"].replace("|", "\\|")
        lines.append(f"| {name} | {', '.join([value, *more])} | {definition} |")
    lines += ["", "All figures hold under these conditions:", "", "| condition | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in conditions.items()]
    lines += ["", "![Firing densities of the latents](densities.png)", ""]
    return "\n".join(lines)


def plot_densities(firing_counts: Tensor, tokens: int) -> bytes:
    """A PNG: histogram of log10 of the share of tokens at which each latent fires; silent latents are counted in the title."""
    figure = Figure(figsize=(6, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    fired = firing_counts[firing_counts > 0].double() / tokens
    axes.hist(fired.log10().numpy(), bins=40, range=(min(-6.0, -math.log10(tokens)), 0.0), color="#3b6ea5")
    axes.set_xlabel("log10 of the share of tokens at which a latent fires")
    axes.set_ylabel("latents")
    axes.set_title(
        f"{len(firing_counts):,} latents, {int((firing_counts == 0).sum()):,} silent on {tokens:,} tokens", fontsize=10
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

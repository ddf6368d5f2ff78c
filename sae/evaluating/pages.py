"""An evaluation as a page to read: a table with the SAEs and their rivals side by side, and the histogram of densities."""

import io
import math
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from torch import Tensor

from sae.evaluating.figures import DEFINITIONS, Figure


def markdown(table: Mapping[str, Mapping[str, Figure]], conditions: Mapping[str, Any]) -> str:
    """`table` holds the figures of each column; the first is the SAE that the evaluation is of."""
    lines = ["# Evaluation of a sparse autoencoder", ""]
    names = [name for name in DEFINITIONS if any(name in column for column in table.values())]
    lines += [f"| figure | {' | '.join(table)} |", "|---" * (1 + len(table)) + "|"]
    for name in names:
        cells = [_cell(name, column[name]) if name in column else "" for column in table.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "In brackets: 95 % intervals by the bootstrap over documents. All figures hold under these conditions:", ""]
    lines += ["| condition | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in conditions.items()]
    lines += ["", "| figure | definition |", "|---|---|"]
    lines += [f"| {name} | {DEFINITIONS[name].replace('|', chr(92) + '|')} |" for name in names]
    lines += ["", "![Firing densities of the latents](densities.png)", ""]
    return "\n".join(lines)


def _cell(name: str, figure: Figure) -> str:
    if not math.isfinite(figure.value):
        return "none"
    shown = f"{figure.value:.4f}" if name != "density" else f"{figure.value:.2e}"
    if figure.interval is None:
        return shown
    low, high = (f"{bound:.4f}" if name != "density" else f"{bound:.2e}" for bound in figure.interval)
    return f"{shown} ({low} to {high})"


def plot_densities(firing_counts: Tensor, tokens: int) -> bytes:
    """A PNG: histogram of log10 of the share of tokens at which each latent fires; silent latents are counted in the title."""
    figure = Picture(figsize=(6, 3.2), dpi=120, layout="constrained")
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

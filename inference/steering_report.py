"""What a steering evaluation found: medians over features with intervals, best strengths, a table and a plot."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

KINDS = ("baseline", "random", "others", "steered")
COLOURS = {"steered": "#b4460f", "random": "#2b6a8f", "others": "#6f8f3a", "baseline": "#8f8578"}
NAMES = {
    "firing": "the feature fires, % of new tokens",
    "words": "words of its label, % of new words",
    "next_token": "next token begins one, %",
    "promoted": "next token is one that the feature promotes, %",
}


def best_strengths(rows: Sequence[Mapping[str, Any]], max_ratio: float) -> dict[str, float]:
    """For each feature the strength at which it fires most above random directions on the choosing prompts, among those whose
    perplexity stays within `max_ratio` of the baseline's; the strongest effect first. Features that nothing raises are left
    out."""
    best: dict[int, tuple[float, float]] = {}
    for row in rows:
        if row["prompts"] == "choosing" and row["steered"]["perplexity"] <= max_ratio * row["baseline"]["perplexity"]:
            rise = row["steered"]["firing"] - row["random"]["firing"]
            best[row["latent"]] = max(best.get(row["latent"], (0.0, 0.0)), (rise, round(row["strength"], 3)))
    found = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))
    return {str(latent): strength for latent, (rise, strength) in found if rise > 0}


def summarise(rows: Sequence[Mapping[str, Any]], best: Mapping[str, float], resamples: int, seed: int) -> list[dict[str, Any]]:
    """For each length, and last for each feature's best strength (a feature without one counts as not steered, with a rise of
    0): medians over the features of the judging prompts. `NAME_over_KIND` is the median of the paired differences with its 95 %
    bootstrap interval over features, `NAME_over_KIND_mean` their mean, `NAME_wins` the share of features above random."""
    judging = [row for row in rows if row["prompts"] == "judging"]
    groups: list[tuple[float | str, list[Mapping[str, Any]]]] = []
    for length in sorted({row["length"] for row in judging}):
        groups.append((length, [row for row in judging if row["length"] == length]))
    chosen = [row for row in judging if best.get(str(row["latent"])) == round(row["strength"], 3)]
    unchosen = [dict(row) | dict.fromkeys(KINDS, row["baseline"]) for row in groups[0][1] if str(row["latent"]) not in best]
    groups.append(("best", [*chosen, *unchosen]))
    return [_summary(length, group, resamples, seed) for length, group in groups]


def _summary(length: float | str, rows: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"length": length, "features": len(rows)}
    columns = {(kind, name): np.array([row[kind][name] for row in rows]) for kind in KINDS for name in rows[0]["steered"]}
    for (kind, name), column in columns.items():
        found[f"{kind}_{name}"] = float(np.median(column))
        found[f"{kind}_{name}_mean"] = float(np.mean(column))
    for name in NAMES:
        steered = columns["steered", name]
        for kind in ("random", "others"):
            found[f"{name}_over_{kind}"] = interval(np.median, steered - columns[kind, name], resamples, seed)
            found[f"{name}_over_{kind}_mean"] = interval(np.mean, steered - columns[kind, name], resamples, seed)
        found[f"{name}_wins"] = float(np.mean(steered > columns["random", name]))
    return found


def interval(
    middle: Callable[..., Any], values: npt.NDArray[np.float64], resamples: int, seed: int
) -> tuple[float, float, float]:
    """The `middle` (np.median or np.mean) of `values` and its 95 % percentile interval, by bootstrap (Efron 1979)."""
    draws = middle(np.random.default_rng(seed).choice(values, (resamples, len(values))), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(middle(values)), float(low), float(high)


def as_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary in Markdown: a table for each thing measured, and one of perplexities."""
    n = summary[0]["features"]
    parts = [
        "# Does it steer?\n",
        f"{n} features. Lengths are shares of a typical activation; `best`: each feature at the strength that the other half "
        "of the prompts chose. Medians over features, read on the unsteered model; in brackets means. Random directions and "
        "the other features' directions have the length of the edit. Differences are medians and means of pairs, with 95 % "
        "bootstrap intervals over features.",
    ]
    for name, title in NAMES.items():
        head = "| length | baseline | random | others | steered | steered - random | its mean | steered - others | its mean | "
        head += "above random |\n" + "|---" * 10 + "|"
        lines = [f"\n## {title[0].upper()}{title[1:]}\n", head]
        for one in summary:
            cells = [f"{100 * one[f'{kind}_{name}']:.2f} ({100 * one[f'{kind}_{name}_mean']:.2f})" for kind in KINDS]
            cells += [_interval(one[f"{name}_over_{kind}"]) for kind in ("random", "random_mean", "others", "others_mean")]
            lines.append(f"| {one['length']} | {' | '.join(cells)} | {one[f'{name}_wins']:.0%} |")
        parts.append("\n".join(lines))
    lines = ["\n## Perplexity under the unsteered model\n", "| length | baseline | random | steered |\n|---|---|---|---|"]
    for one in summary:
        lines.append(
            f"| {one['length']} | " + " | ".join(f"{one[f'{k}_perplexity']:.0f}" for k in KINDS if k != "others") + " |"
        )
    return "\n".join([*parts, "\n".join(lines)]) + "\n"


def _interval(values: Sequence[float]) -> str:
    middle, low, high = (100 * value for value in values)
    return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"


def as_plot(summary: Sequence[Mapping[str, Any]]) -> bytes:
    """Firing, label words and perplexity against length, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    lengths = [one for one in summary if one["length"] != "best"]
    x = [one["length"] for one in lengths]
    for axis, (name, title, scale) in zip(
        axes, [("firing", NAMES["firing"], 100), ("promoted", NAMES["promoted"], 100), ("perplexity", "perplexity", 1)],
        strict=True,
    ):  # fmt: skip
        for kind, colour in COLOURS.items():
            if (kind, name) != ("others", "perplexity"):
                axis.plot(x, [scale * one[f"{kind}_{name}"] for one in lengths], "o-", color=colour, label=kind)
        if name in NAMES:
            lows, highs = (
                [100 * (one[f"random_{name}"] + one[f"{name}_over_random"][end]) for one in lengths] for end in (1, 2)
            )
            axis.fill_between(x, lows, highs, color=COLOURS["steered"], alpha=0.15, linewidth=0)
        axis.set(
            xscale="log", yscale="log" if name == "perplexity" else "linear", xlabel="length / typical activation", title=title
        )
        axis.set_xticks(x, [f"{length:g}" for length in x], minor=False)
    axes[0].legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    return picture.getvalue()

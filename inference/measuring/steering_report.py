"""What a steering evaluation found: medians over features with intervals, best strengths, a table and a plot."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = Sequence[Mapping[str, Any]]
Group = tuple[float | str, Rows]
"""A length, or "best", and a row for each feature."""

KINDS = ("baseline", "random", "others", "steered")
MEASURES = {
    "firing": ("The feature fires", "% of the new tokens on which it fires, read on the unsteered model"),
    "promoted": (
        "The next token is one that the feature promotes",
        "% of the steered model's next-token probability that is on the tokens whose logits its direction raises most",
    ),
    "follows": (
        "The next token is one that follows the feature in the corpus",
        "% of that probability that is on the tokens which stand right behind its largest activations",
    ),
    "next_token": (
        "The next token begins a word of its label",
        "% of that probability; a label names words on which the feature fires",
    ),
    "words": ("Words of its label", "% of the new words"),
}
COLOURS = {"steered": "#b4460f", "random": "#2b6a8f", "others": "#6f8f3a", "baseline": "#8f8578"}
NAMES = {"steered": "the feature", "random": "random directions", "others": "other features", "baseline": "unsteered"}


def best_strengths(rows: Rows, max_ratio: float) -> dict[str, float]:
    """For each feature the largest strength whose texts have a perplexity within `max_ratio` of the baseline's, on all prompts;
    the strongest effect first. Features for which the smallest one costs more are left out."""
    best = _chosen(rows, max_ratio, "all")
    rise = {row["latent"]: _rise(row) for row in rows if row["prompts"] == "all" and best.get(row["latent"]) == row["length"]}
    strength = {(row["latent"], row["length"]): round(row["strength"], 3) for row in rows}
    return {str(latent): strength[latent, best[latent]] for latent in sorted(best, key=lambda latent: (-rise[latent], latent))}


def _chosen(rows: Rows, max_ratio: float, prompts: str) -> dict[int, float]:
    """The length behind `best_strengths`, chosen on some of the prompts.

    The effect itself does not choose: it grows with the length for most features, and on the few hundred tokens that there are
    of each its noise would (docs/log.md, 2026-11-25). Perplexity is known to a tenth.
    """
    best: dict[int, float] = {}
    for row in rows:
        if row["prompts"] == prompts and row["steered"]["perplexity"] <= max_ratio * row["baseline"]["perplexity"]:
            best[row["latent"]] = max(row["length"], best.get(row["latent"], 0.0))
    return best


def _rise(row: Mapping[str, Any]) -> float:
    return float(row["steered"]["firing"] - row["random"]["firing"])


def grouped(rows: Rows, max_ratio: float) -> list[Group]:
    """Rows of all prompts for each length, and last, as "best", for each feature the mean of two: at the strength that the even
    prompts chose, judged by the odd ones, and the other way round. A feature without a strength counts as not steered."""
    whole = [row for row in rows if row["prompts"] == "all"]
    groups: list[Group] = [
        (length, [row for row in whole if row["length"] == length]) for length in sorted({row["length"] for row in whole})
    ]
    folds = []
    for choosing, judging in (("odd", "even"), ("even", "odd")):
        best = _chosen(rows, max_ratio, choosing)
        judged = {(row["latent"], row["length"]): row for row in rows if row["prompts"] == judging}
        first = groups[0][0]
        folds.append(
            [
                judged[latent, best[latent]]
                if latent in best
                else dict(judged[latent, first]) | dict.fromkeys(KINDS, judged[latent, first]["baseline"])
                for latent in (row["latent"] for row in groups[0][1])
            ]
        )
    return [*groups, ("best", [_mean(*pair) for pair in zip(*folds, strict=True)])]


def _mean(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    means = {kind: {name: (value + other[kind][name]) / 2 for name, value in one[kind].items()} for kind in KINDS}
    return {"latent": one["latent"], "label": one["label"], **means}


def summarise(groups: Sequence[Group], resamples: int, seed: int) -> list[dict[str, Any]]:
    """For each group medians over its features. `NAME_over_KIND` is the median of the paired differences with its 95 %
    bootstrap interval over features, `NAME_over_KIND_mean` their mean, `NAME_wins` the share of features above random."""
    return [_summary(length, rows, resamples, seed) for length, rows in groups]


def _summary(length: float | str, rows: Rows, resamples: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"length": length, "features": len(rows)}
    columns = {(kind, name): np.array([row[kind][name] for row in rows]) for kind in KINDS for name in rows[0]["steered"]}
    for (kind, name), column in columns.items():
        found[f"{kind}_{name}"] = float(np.median(column))
        found[f"{kind}_{name}_mean"] = float(np.mean(column))
    for name in MEASURES:
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


def in_a_line(best: Mapping[str, Any]) -> str:
    """What the summary at the best strengths says."""
    middle, low, high = (100 * value for value in best["firing_over_random"])
    fires, wins = 100 * best["steered_firing"], best["firing_wins"]
    baseline, random, steered = (best[f"{kind}_perplexity"] for kind in ("baseline", "random", "steered"))
    return (
        f"{best['features']} features, each at its best strength: the median feature fires on {fires:.2f} % of the new tokens, "
        f"{middle:+.2f} points more than under random directions (95 % interval {low:+.2f} to {high:+.2f}); {wins:.0%} of them "
        f"lie above random; perplexity {baseline:.0f} unsteered, {random:.0f} under random directions, {steered:.0f} steered"
    )


def as_table(summary: Sequence[Mapping[str, Any]], rows: Rows, best: Mapping[str, float], max_ratio: float) -> str:
    """The evaluation in Markdown: what it says in a line, a table for each measure, and a line a feature."""
    parts = [
        f"# Does it steer?\n\n{in_a_line(summary[-1])}.\n",
        "Lengths are shares of a typical activation. `best` is each feature at the largest length whose texts have a "
        f"perplexity up to {max_ratio:g} times that of the unsteered ones, chosen on one half of the prompts and judged on the "
        "other, both ways round. Random directions and the other features' directions have the length of the edit. Figures are "
        "medians over features; differences are medians and means of pairs, with 95 % bootstrap intervals over features. More "
        "is in `steering.json`.",
    ]
    for name, (title, unit) in MEASURES.items():
        head = "| length | unsteered | random | other features | the feature | feature - random | its mean | above random |\n"
        lines = [f"\n## {title}\n\n{unit}\n", head + "|---" * 8 + "|"]
        for one in summary:
            cells = [f"{100 * one[f'{kind}_{name}']:.2f}" for kind in KINDS]
            cells += [_interval(one[f"{name}_over_{kind}"]) for kind in ("random", "random_mean")]
            lines.append(f"| {one['length']} | {' | '.join(cells)} | {one[f'{name}_wins']:.0%} |")
        parts.append("\n".join(lines))
    lines = ["\n## What it costs\n\nperplexity of the new texts under the unsteered model\n"]
    lines.append("| length | unsteered | random | other features | the feature |\n|---|---|---|---|---|")
    lines += [f"| {one['length']} | " + " | ".join(f"{one[f'{k}_perplexity']:.0f}" for k in KINDS) + " |" for one in summary]
    return "\n".join([*parts, *lines, *_feature_lines(rows, best)]) + "\n"


def _interval(values: Sequence[float]) -> str:
    middle, low, high = (100 * value for value in values)
    return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"


def _feature_lines(rows: Rows, best: Mapping[str, float]) -> list[str]:
    """A line a feature at its best strength, on all prompts."""
    found = {
        str(row["latent"]): row
        for row in rows
        if row["prompts"] == "all" and best.get(str(row["latent"])) == round(row["strength"], 3)
    }
    lines = ["\n## Each feature\n\nstrength in multiples of its maximum; on all prompts, % as above, random -> steered\n"]
    lines.append("| latent | label | strength | fires | promoted | follows | label's words | perplexity |\n" + "|---" * 8 + "|")
    for latent, strength in best.items():
        row = found[latent]
        cells = [
            f"{100 * row['random'][name]:.2f} -> {100 * row['steered'][name]:.2f}"
            for name in ("firing", "promoted", "follows", "words")
        ]
        label = row["label"].replace("|", "\\|")
        lines.append(f"| {latent} | {label} | {strength:g} | {' | '.join(cells)} | {row['steered']['perplexity']:.0f} |")
    return lines


def as_plot(summary: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> bytes:
    """Firing by length, by feature at its best strength, the next token's probability, and perplexity, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    ((firing, each), (chances, cost)) = figure.subplots(2, 2)
    lengths = [one for one in summary if one["length"] != "best"]
    x = [one["length"] for one in lengths]
    for kind, colour in COLOURS.items():
        firing.plot(x, [100 * one[f"{kind}_firing"] for one in lengths], "o-", color=colour, label=NAMES[kind])
        cost.plot(x, [one[f"{kind}_perplexity"] for one in lengths], "o-", color=colour, label=NAMES[kind])
    firing.set(title="The feature fires", ylabel="% of new tokens, median feature", ylim=(0, None))
    cost.set(title="What it costs", ylabel="perplexity under the unsteered model", yscale="log")
    cost.yaxis.set_major_formatter("{x:.0f}")
    cost.yaxis.set_minor_formatter("{x:.0f}")

    differences = 100 * np.sort([_rise(row) for row in groups[-1][1]])[::-1]
    colours = [COLOURS["steered"] if value > 0 else COLOURS["random"] for value in differences]
    each.bar(np.arange(len(differences)), differences, color=colours, width=0.9)
    each.axhline(0, color="black", linewidth=0.8)
    each.set(
        title=f"Each feature at its best strength: {np.mean(differences > 0):.0%} above random",
        ylabel="% of new tokens, feature - random", xlabel="features, by effect", yscale="symlog",
    )  # fmt: skip
    each.yaxis.set_major_formatter("{x:g}")

    named = {
        "promoted": "the feature promotes",
        "follows": "follow it in the corpus",
        "next_token": "begin a word of its label",
    }
    for (name, label), colour in zip(named.items(), ("#b4460f", "#6f8f3a", "#2b6a8f"), strict=True):
        middles, lows, highs = (100 * np.array([one[f"{name}_over_random"][i] for one in lengths]) for i in range(3))
        chances.plot(x, middles, "o-", color=colour, label=label)
        chances.fill_between(x, lows, highs, color=colour, alpha=0.15, linewidth=0)
    chances.axhline(0, color="black", linewidth=0.8)
    chances.set(title="Probability of next tokens that ...", ylabel="points, feature - random, median feature")
    for axis in (firing, chances, cost):
        axis.set_xlabel("length of the edit, as a share of a typical activation")
        axis.set_xticks(x, [f"{length:g}" for length in x], minor=False)
        axis.legend(frameon=False)
    for axis in (firing, each, chances, cost):
        axis.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()

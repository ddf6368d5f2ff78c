"""Does it steer? Features against random directions of the same length, on the text that they make the model write.

    python -m inference.steering_eval --out steering/                      the 100 best explained features of the embedded model
    python -m inference.steering_eval --model M --sae run/sae --top top/ --explanations explanations/ --out steering/

For each feature and strength, prompts are continued with `add`. The text is then read on the **unsteered** model: on which
share of the new tokens the feature fires, how often the words of its label come, and how surprised that model is (perplexity).
The same is measured for random directions of equal norm at the same tokens. Writes a line a feature and strength, a table, a
plot, and the best strength of each feature.
"""

import io
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.artifact import building, open_artifact
from core.cli import Progress, run_stage
from core.runtime import Runtime
from inference.session import EMBEDDED, Features, InferenceConfig, Session, open_session
from inference.steering import FIRST_STEERED, Edit, Recipe
from inference.workbench import confidence, default_strength
from llama3.generate import HooksFor, Sampling, generate

log = logging.getLogger("inference.steering_eval")

PROMPTS = ("The", "She said that", "In the morning", "We", "It is", "When he came back,", "There was", "Then")
WORD = re.compile(r"[a-z]{3,}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(InferenceConfig):
    """Flags of `inference.steering_eval`."""

    out: Path
    """Folder to write."""
    features: int = 100
    """How many features, the best explained ones first."""
    relative_strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Multiples of each feature's default strength, at which the edit is 0.4 times as long as a typical activation."""
    max_new_tokens: int = 24
    """New tokens per prompt."""
    max_perplexity_ratio: float = 3.0
    """The best strength of a feature is the strongest effect whose perplexity is at most this multiple of the baseline's."""
    resamples: int = 2000
    """Bootstrap resamples over features behind each 95 % interval."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features < 1 or self.max_new_tokens < 1 or self.resamples < 1:
            raise ValueError("--features, --max-new-tokens and --resamples must be at least 1")
        if not self.relative_strengths or not all(0 < s <= 100 for s in self.relative_strengths):
            raise ValueError(f"--relative-strengths: expected numbers above 0, at most 100; found {self.relative_strengths}")


class Measured(NamedTuple):
    """What the unsteered model says of a set of new texts."""

    firing: float
    """Share of new tokens on which the feature fires."""
    words: float
    """Share of new words that are words of the feature's label."""
    perplexity: float


class Written(NamedTuple):
    """New texts, with what reading them once on the unsteered model gave."""

    text: str
    perplexity: float
    fired: Tensor
    """[n_latents] share of new tokens on which each latent fires."""


def run(config: EvalConfig, runtime: Runtime) -> None:
    """Measure, and write the folder."""
    session = open_session(config, runtime.device)
    features = session.needs_features()
    chosen = best_explained(features, config.features)
    if not chosen:
        raise ValueError("no feature has a label, so there is nothing to measure; give --explanations")
    folders = [(config.sae, "sae"), (config.top, "top"), (config.explanations, "explanations")]
    inputs = [open_artifact(path or EMBEDDED / name) for path, name in folders]
    with building(config.out, "steering", config, runtime, inputs, {"sae_hash": features.sae.weights_hash}) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        if runtime.is_main:
            rows = list(measure(session, config, chosen))
            summary = summarise(rows, config)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            best = best_strengths(rows, config.max_perplexity_ratio)
            builder.publish("steering.jsonl", lines.encode(), rows=len(rows))
            builder.publish("best_strengths.json", (json.dumps(best, indent=1) + "\n").encode(), rows=len(best))
            builder.publish("steering.md", as_table(summary).encode())
            builder.publish("steering.png", as_plot(summary))
        names = ["best_strengths.json", "steering.jsonl", "steering.md", "steering.png"]
        builder.finish(names if runtime.is_main else [], {"features": len(chosen)})
    if runtime.is_main:
        peak = max(summary, key=lambda one: one["difference"][0])
        low, high = peak["difference"][1:]
        log.info(
            "%s: %d features; at %g x the default strength the median feature fires on %+.1f points more of the new tokens "
            "than under random directions (95 %% interval %+.1f to %+.1f)",
            config.out, len(chosen), peak["relative"], 100 * peak["difference"][0], 100 * low, 100 * high,
        )  # fmt: skip


def best_explained(features: Features, n: int) -> list[int]:
    """The `n` latents whose valid explanation is trusted most, of those that ever fire."""
    known = [latent for latent in features.explanations if features.label(latent) and float(features.max_values[latent]) > 0]
    return sorted(known, key=lambda latent: (-confidence(features, latent), latent))[:n]


def measure(session: Session, config: EvalConfig, chosen: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A record for each feature and strength: baseline, steered and random, each as `Measured`."""
    features = session.needs_features()
    baseline = write(session, config, None)
    generator = torch.Generator().manual_seed(config.seed)
    with Progress("steering", len(chosen), "features") as bar:
        for latent in chosen:
            wanted = set(WORD.findall(features.label(latent).lower()))
            gaussian = torch.randn(features.sae.cfg.d_model, generator=generator)
            for relative in config.relative_strengths:
                strength = relative * default_strength(features, latent)
                recipe = Recipe((Edit(latent=latent, strength=strength),), features.sae.weights_hash)
                lengths = [len(ids) for ids in prompts_of(session)]
                hooks = features.steering.hooks_for([recipe] * len(lengths), lengths)
                size = strength * float(features.max_values[latent])
                noise = add_vector(features, (gaussian / gaussian.norm() * size).to(session.model.device))
                yield {
                    "latent": latent, "label": features.label(latent), "relative": relative, "strength": strength,
                    "baseline": judged(baseline, latent, wanted)._asdict(),
                    "steered": judged(write(session, config, hooks), latent, wanted)._asdict(),
                    "random": judged(write(session, config, noise), latent, wanted)._asdict(),
                }  # fmt: skip
            bar.update(1)


def prompts_of(session: Session) -> list[list[int]]:
    return [session.tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]


def add_vector(features: Features, vector: Tensor) -> HooksFor:
    """Hooks that add `vector` (D), in the SAE's normalised units, to every token but the sink: the control for `add`."""

    def add(x: Tensor, positions: Tensor) -> Tensor:
        moved = x + (vector / features.sae.normalise(x).scale).to(x.dtype)
        return torch.where((positions >= FIRST_STEERED)[:, :, None], moved, x)

    return lambda positions: {features.site: partial(add, positions=positions)}


@torch.no_grad()
def write(session: Session, config: EvalConfig, hooks: HooksFor | None) -> Written:
    """Continue all prompts under `hooks`, then read the new tokens on the unsteered model."""
    features = session.needs_features()
    rows = prompts_of(session)
    starts = [len(row) for row in rows]
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=1.0, top_p=1.0, seed=config.seed)
    for piece in generate(session.model, session.tokenizer, prompts_of(session), sampling, hooks):
        rows[piece.row].append(piece.token_id)
    losses, fired, n_tokens = [], torch.zeros(features.n_latents), 0
    for row, start in zip(rows, starts, strict=True):
        tokens = torch.tensor([row], device=session.model.device)
        scores = session.model(tokens)[0, start - 1 : -1].float()
        losses.append(F.cross_entropy(scores, tokens[0, start:], reduction="sum"))
        reading = session.read(row)
        active = reading.indices[start:][reading.values[start:] > 0]
        fired += torch.bincount(active.flatten(), minlength=features.n_latents)
        n_tokens += len(row) - start
    text = " ".join(session.tokenizer.decode(row[start:], skip_special=True) for row, start in zip(rows, starts, strict=True))
    return Written(text, math.exp(min(50.0, float(sum(losses)) / n_tokens)), fired / n_tokens)


def judged(written: Written, latent: int, wanted: set[str]) -> Measured:
    """One feature's view of new texts; `wanted` are the words of its label."""
    words = WORD.findall(written.text.lower())
    share = sum(word in wanted for word in words) / max(1, len(words))
    return Measured(float(written.fired[latent]), share, written.perplexity)


def summarise(rows: Sequence[dict[str, Any]], config: EvalConfig) -> list[dict[str, Any]]:
    """For each strength: medians over features, and the median of steered minus random firing with its 95 % interval."""
    random = np.random.default_rng(config.seed)
    summary = []
    for relative in config.relative_strengths:
        here = [row for row in rows if row["relative"] == relative]
        difference = np.array([row["steered"]["firing"] - row["random"]["firing"] for row in here])
        draws = np.median(random.choice(difference, (config.resamples, len(difference))), axis=1)
        low, high = np.percentile(draws, [2.5, 97.5])
        medians = {
            f"{kind}_{name}": float(np.median([row[kind][name] for row in here]))
            for kind in ("baseline", "steered", "random")
            for name in Measured._fields
        }
        wins = float(np.mean(difference > 0))
        summary.append(
            {"relative": relative, "difference": (float(np.median(difference)), float(low), float(high)), "wins": wins}
            | medians
        )
    return summary


def best_strengths(rows: Sequence[dict[str, Any]], max_ratio: float) -> dict[str, float]:
    """For each feature the strength at which it fires most, among those whose perplexity stays within `max_ratio` of the
    baseline's; features without one are left out."""
    best: dict[int, tuple[float, float]] = {}
    for row in rows:
        if row["steered"]["perplexity"] <= max_ratio * row["baseline"]["perplexity"]:
            rise = row["steered"]["firing"] - row["random"]["firing"]
            best[row["latent"]] = max(best.get(row["latent"], (0.0, 0.0)), (rise, row["strength"]))
    return {str(latent): strength for latent, (rise, strength) in sorted(best.items()) if rise > 0}


def as_table(summary: Sequence[dict[str, Any]]) -> str:
    """The summary in Markdown."""
    head = "| strength / default | fires: baseline | random | steered | steered - random (95 %) | features that win | "
    head += "label words: random | steered | perplexity: baseline | random | steered |\n" + "|---" * 11 + "|\n"
    lines = []
    for one in summary:
        middle, low, high = (100 * value for value in one["difference"])
        firing = " | ".join(f"{100 * one[f'{kind}_firing']:.1f} %" for kind in ("baseline", "random", "steered"))
        words = " | ".join(f"{100 * one[f'{kind}_words']:.2f} %" for kind in ("random", "steered"))
        perplexity = " | ".join(f"{one[f'{kind}_perplexity']:.0f}" for kind in ("baseline", "random", "steered"))
        lines.append(
            f"| {one['relative']:g} | {firing} | {middle:+.1f} ({low:+.1f} to {high:+.1f}) | {one['wins']:.0%} | {words} | "
            f"{perplexity} |\n"
        )
    note = "\nMedians over features; read on the unsteered model; random directions have the length of the edit.\n"
    return "# Does it steer?\n\n" + head + "".join(lines) + note


def as_plot(summary: Sequence[dict[str, Any]]) -> bytes:
    """Firing and perplexity against strength, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    x = [one["relative"] for one in summary]
    for kind, colour in (("steered", "#b4460f"), ("random", "#2b6a8f"), ("baseline", "#8f8578")):
        left.plot(x, [100 * one[f"{kind}_firing"] for one in summary], "o-", color=colour, label=kind)
        right.plot(x, [one[f"{kind}_perplexity"] for one in summary], "o-", color=colour, label=kind)
    left.set(xscale="log", xlabel="strength / default", ylabel="% of new tokens", title="The feature fires (median feature)")
    right.set(xscale="log", yscale="log", xlabel="strength / default", title="Perplexity under the unsteered model")
    left.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    return picture.getvalue()


if __name__ == "__main__":
    run_stage(EvalConfig, run, __doc__ or "")

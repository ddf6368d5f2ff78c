"""Does it steer? Features against random directions of the same length, on the text that they make the model write.

    python -m inference.steering_eval --out steering/                      the embedded model's first 100 features
    python -m inference.steering_eval --model M --sae run/sae --top top/ --explanations explanations/ --out steering/

Each feature is added (`add`, all positions) at several lengths while the model continues neutral prompts. The text is then read
on the unsteered model: on which share of the new tokens the feature fires, how often the words of its label come, and how
surprised that model is (perplexity). Beside it stands how likely the steered model makes, as its next token, those that the
feature promotes, those that follow where it fires in the corpus, and those that begin a word of its label. The same is measured
for random directions and for the other features' directions of the same length.

A feature's best strength is the largest whose texts stay within --max-perplexity-ratio. Half of the prompts choose it and the
other half judge it, then the other way round. Writes a line a feature and length, a table, a plot, and the best strengths,
which inference.app takes as its defaults. A run that was interrupted goes on with the first length that is missing.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.artifact import Builder, building, open_artifact
from core.cli import Progress, run_stage
from core.runtime import Runtime
from core.text import lines, read_text
from inference.measuring.steered_texts import (
    Interventions,
    Panel,
    Written,
    continued,
    first_tokens,
    following_tokens,
    label_words,
    promoted_tokens,
)
from inference.measuring.steering_report import as_plot, as_table, best_strengths, grouped, in_a_line, summarise
from inference.session import BEST_STRENGTHS, Features, InferenceConfig, Session, folders_of, open_session
from inference.steering import Edit, Recipe
from interpretability.search import shown_first
from llama3.generate import Sampling, check_prompts

log = logging.getLogger("inference.steering_eval")

PROMPTS = (
    "The", "She said that", "In the morning", "We", "It is", "When he came back,", "There was", "Then",
    "This function", "If the argument", "Note that the", "Returns a", "For example,", "The result of", "You can use",
    "By default,",
    "He had", "On the way home", "They were", "At the end of", "A new", "My father", "After the war,", "Some of the",
    "The following", "When the method", "Each element of", "This class", "It may be", "An error", "The name of the",
    "One way to",
)  # fmt: skip
"""Beginnings in the two kinds of text of the embedded corpus, stories and documentation, as many of each at odd and at even
places."""
HALVES = {"odd": slice(0, None, 2), "even": slice(1, None, 2), "all": slice(None)}
"""Prompts by their place, counted from 1: one half chooses strengths where the other judges."""
ROWS_FILE = "steering.jsonl"
TOP_K = 200
"""Texts are sampled at temperature 1 from so many tokens: sorting the whole vocabulary took half of the time."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(InferenceConfig):
    """Flags of `inference.steering_eval`."""

    out: Path
    """Folder to write."""
    features: int = 100
    """How many features, those that are shown first (interpretability/labels/first.py). Each is the control of all others."""
    lengths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    """Lengths of the edit, as shares of a typical activation."""
    directions: int = 8
    """Random directions, each at every length and prompt."""
    prompts: Path | None = None
    """File with a prompt a line, two at least. None: 32 built-in ones."""
    max_new_tokens: int = 32
    """New tokens per prompt."""
    max_perplexity_ratio: float = 3.0
    """A feature's best strength is the largest with a perplexity up to this multiple of the unsteered texts'."""
    resamples: int = 2000
    """Bootstrap resamples over features behind each 95 % interval."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("features", 2), ("directions", 1), ("max_new_tokens", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}; found {getattr(self, name)}")
        if not self.lengths or not all(0 < length <= 100 for length in self.lengths):
            raise ValueError(f"--lengths: expected numbers above 0, at most 100; found {self.lengths}")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"--lengths: expected each once; found {self.lengths}")
        if not self.max_perplexity_ratio >= 1:  # NaN compares False, so it ends here too
            raise ValueError(f"--max-perplexity-ratio: expected 1 or more; found {self.max_perplexity_ratio}")


class Measured(NamedTuple):
    """What the unsteered model says of a set of new texts."""

    firing: float
    """Share of new tokens on which the feature fires."""
    words: float
    """Share of new words that are words of the feature's label."""
    next_token: float
    """Probability that the next token begins a word of the label, meaned over the baseline's text; no sampling, so no noise."""
    promoted: float
    """The same for the tokens that the feature's direction promotes."""
    follows: float
    """The same for the tokens that follow where it fires most in its top sentences."""
    perplexity: float


def run(config: EvalConfig, runtime: Runtime) -> None:
    """Measure, and write the folder."""
    prompts = read_prompts(config.prompts)
    session = open_session(config, runtime.device)
    features = session.needs_features()
    chosen = to_measure(features, config.features)
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} features with a label were found, expected at least 2 to compare; give --explanations")
    check_prompts(session.model, session.tokenizer, as_ids(session, prompts))  # before the folder is begun
    inputs = [open_artifact(path) for path in folders_of(config)[0][:3] if path is not None]
    provenance = {"sae_hash": features.sae.weights_hash, "bos": session.tokenizer.bos_policy}
    with building(config.out, "steering", config, runtime, inputs, provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        names = [ROWS_FILE, BEST_STRENGTHS, "steering.json", "steering.md", "steering.png"]
        if runtime.is_main:
            rows = measured_rows(builder, session, config, chosen, prompts)
            best = best_strengths(rows, config.max_perplexity_ratio)
            groups = grouped(rows, config.max_perplexity_ratio)
            summary = summarise(groups, config.resamples, config.seed)
            table = as_table(summary, rows, best, config.max_perplexity_ratio)
            contents = [as_json(best).encode(), as_json(summary).encode(), table.encode(), as_plot(summary, groups)]
            for name, content in zip(names[1:], contents, strict=True):
                builder.publish(name, content)
            log.info("%s: %s", config.out, in_a_line(summary[-1]))
            log.info("%s: the table, %s: the picture", config.out / "steering.md", config.out / "steering.png")
        builder.finish(names if runtime.is_main else [], {"features": len(chosen)})


def measured_rows(
    builder: Builder, session: Session, config: EvalConfig, chosen: Sequence[int], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """What `measure` says of all lengths, written to ROWS_FILE; a length that an interrupted run had finished is not measured
    again."""
    parts = {length: f"length-{length}.jsonl" for length in config.lengths}
    if not builder.has(ROWS_FILE):
        left = [length for length in config.lengths if not builder.has(parts[length])]
        if len(left) < len(parts):
            log.info("%d of %d lengths were measured before", len(parts) - len(left), len(parts))
        for length, rows in measure(session, config, chosen, prompts, left):
            builder.publish(parts[length], "".join(json.dumps(row) + "\n" for row in rows).encode())
        builder.publish(ROWS_FILE, b"".join(builder.read(name) for name in parts.values()))
    for name in parts.values():
        builder.forget(name)
    return [json.loads(line) for line in lines(builder.read(ROWS_FILE).decode())]


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a file, one a line, or the built-in ones; ValueError where there are fewer than two."""
    if path is None:
        return list(PROMPTS)
    prompts = [line for line in lines(read_text(path, f"--prompts {path}")) if line.strip()]
    if len(prompts) < 2:
        raise ValueError(f"--prompts {path}: expected two prompts or more, one a line; found {len(prompts)}")
    return prompts


def as_ids(session: Session, prompts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each prompt, as the model met texts in training."""
    return tuple(tuple(session.tokenizer.encode_prompt(prompt)) for prompt in prompts)


def to_measure(features: Features, n: int) -> list[int]:
    """The `n` latents that are shown first where nothing was measured, of those that fire."""
    first = shown_first(features.explanations, features.top.peak_variety)
    return [latent for latent in first if float(features.max_values[latent]) > 0][:n]


def measure(
    session: Session, config: EvalConfig, chosen: Sequence[int], prompts: Sequence[str], lengths: Sequence[float]
) -> Iterator[tuple[float, list[dict[str, Any]]]]:
    """For each length a record for each feature and set of prompts (HALVES): baseline, random, other features, steered, as
    `Measured`."""
    if not lengths:
        return
    features = session.needs_features()
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=1.0, top_k=TOP_K, top_p=1.0, seed=config.seed)
    wanted = tuple(label_words(features.label(latent)) for latent in chosen)
    ids = as_ids(session, prompts)
    panel = Panel(session, tuple(chosen), wanted, ids, sampling)
    starts = [len(row) for row in ids]
    texts = continued(session, [list(row) for row in ids], sampling, None)
    size = typical_length(session, texts)
    generator = torch.Generator().manual_seed(config.seed)
    random = torch.nn.functional.normalize(torch.randn(config.directions, features.sae.cfg.d_model, generator=generator), dim=1)
    tables = [
        first_tokens(wanted, session.tokenizer),
        promoted_tokens(features, chosen, session.tokenizer),
        following_tokens(features, chosen, session.tokenizer),
    ]

    def chances(interventions: Interventions) -> list[Tensor]:
        """[M, F] each: that the next token is one of `tables`."""
        found = panel.next_tokens(interventions, texts[1::2], starts[1::2])
        return [found @ table for table in tables]

    n = len(lengths) * (len(chosen) + config.directions) + config.directions
    with Progress("steering", n, "directions") as bar:
        nothing = [Recipe()] * config.directions
        baseline = panel.write(nothing, bar.update), [chance.expand(len(nothing), -1) for chance in chances(nothing[:1])]
        for length in lengths:
            rows: list[dict[str, Any]] = []
            strengths = [length * size / float(features.max_values[latent]) for latent in chosen]
            recipes = [
                Recipe((Edit(latent=latent, strength=strength),), features.sae.weights_hash)
                for latent, strength in zip(chosen, strengths, strict=True)
            ]
            pushes = (random * length * size).to(session.model.device)
            steered = panel.write(recipes, bar.update), chances(recipes)
            control = panel.write(pushes, bar.update), chances(pushes)
            for f, latent in enumerate(chosen):
                own, others = [f], [other for other in range(len(chosen)) if other != f]
                for half, which in HALVES.items():
                    judge = partial(judged, f=f, prompts=which)
                    rows.append(
                        {
                            "latent": latent,
                            "label": features.label(latent),
                            "length": length,
                            "strength": strengths[f],
                            "prompts": half,
                            "baseline": judge(*baseline),
                            "random": judge(*control),
                            "others": judge(*steered, which=others),
                            "steered": judge(*steered, which=own),
                        }
                    )
            yield length, rows


def judged(
    written: Written, chances: Sequence[Tensor], f: int, prompts: slice, which: Sequence[int] | None = None
) -> dict[str, float]:
    """Feature `f`'s view of the texts of the interventions `which` (None: all), pooled over them: a `Measured` with six digits
    of each figure."""
    rows = list(range(len(written.tokens))) if which is None else list(which)
    tokens = float(written.tokens[rows, prompts].sum())
    found = Measured(
        firing=float(written.fired[rows, prompts, f].sum()) / max(1.0, tokens),
        words=float(written.words[rows, prompts, f].sum()) / max(1.0, float(written.n_words[rows, prompts].sum())),
        next_token=float(chances[0][rows, f].mean()),
        promoted=float(chances[1][rows, f].mean()),
        follows=float(chances[2][rows, f].mean()),
        perplexity=math.exp(min(50.0, float(written.loss[rows, prompts].sum()) / max(1.0, tokens))),
    )
    return {name: float(f"{value:.6g}") for name, value in found._asdict().items()}


@torch.no_grad()
def typical_length(session: Session, texts: Sequence[Sequence[int]]) -> float:
    """Mean norm of the normalised activations at the SAE's site on `texts`, without the attention sink."""
    features = session.needs_features()
    norms = []
    for text in texts:
        x = session.model.capture(torch.tensor([list(text)], device=session.model.device), sites=[features.site])
        norms.append(features.sae.normalise(x[features.site][0, 1:].float()).z.norm(dim=1))
    return float(torch.cat(norms).mean())


if __name__ == "__main__":
    run_stage(EvalConfig, run, __doc__ or "")

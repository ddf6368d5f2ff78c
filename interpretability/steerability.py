"""Which features steer, before anything is generated: every latent turned up once, and what that does to the next token.

    python -m interpretability.steerability --model demo --sae demo/sae --out steerability/
    python -m interpretability.steerability --model demo --sae demo/sae --steering demo/steering --out steerability/

Each latent is turned up at the last token of neutral prompts. Its output score says how far its own
promoted tokens then come to the front (arXiv:2505.20063), the change of token confidence how much
surer of few tokens the model becomes (arXiv:2510.03659); interpretability/causal/turned_up.py has the
formulas. `interpretability.search --rank steerability` orders by the output score, and the report
shows both. With --steering, a folder of inference.steering_eval, the figures are held against what
features did when they steered.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from core.artifact import building, open_artifact
from core.cli import Progress, StageConfig, run_stage
from core.runtime import Runtime
from interpretability.causal.records import (
    MEASURES,
    STEERABILITY_FILE,
    STEERABILITY_SCHEMA,
    Steerability,
    read_steered,
)
from interpretability.causal.turned_up import Latents, TurnedUp
from interpretability.causal.validation import validate
from interpretability.opening import check_sae, open_explanations_of
from interpretability.records import Explanation, parquet_bytes, title_of
from llama3 import load_model, load_tokenizer
from sae.model import load

PROMPTS = ("From my experience,", "I think that", "She said that it", "In the end, the")
SHOWN = 25
NAMES = {
    "output_score": "output score",
    "output_rise": "its rise",
    "confidence_change": "change of confidence",
    "firing": "fires",
    "promoted": "promoted tokens",
    "follows": "tokens that follow it",
    "next_token": "its label's words, next token",
    "words": "its label's words, written",
}

log = logging.getLogger("interpretability.steerability")


@dataclass(frozen=True, kw_only=True)
class SteerabilityConfig(StageConfig):
    """Flags of `python -m interpretability.steerability`."""

    model: str
    """The model: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo."""
    sae: Path
    """Folder of the SAE."""
    explanations: Path | None = None
    """Explanations of its latents, for the titles in the table. None: numbers."""
    steering: Path | None = None
    """Folder of inference.steering_eval of the same SAE, to hold the figures against. None: no comparison."""
    out: Path
    """Folder to write."""
    prompts: tuple[str, ...] = PROMPTS
    """Neutral beginnings at whose last token latents are turned up."""
    factor: float = 10.0
    """How far: in multiples of the largest activation that any latent has at that token."""
    promoted: int = 20
    """Tokens that count as promoted by a latent."""
    rows: int = 64
    """Latents in a batch."""
    resamples: int = 2000
    """Bootstrap resamples over features behind each 95 % interval."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("--prompts: give at least one")
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"--factor must be a number above 0; found {self.factor}")
        for name in ("promoted", "rows", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; found {getattr(self, name)}")


def run(config: SteerabilityConfig, runtime: Runtime) -> None:
    """Write the folder `config.out` of kind `steerability`."""
    tokenizer = load_tokenizer(config.model)
    sae = load(config.sae, runtime.device)
    model = load_model(config.model, device=runtime.device).eval().requires_grad_(False)
    check_sae(sae, config.sae, model, tokenizer)
    steered = read_steered(config.steering, sae.weights_hash) if config.steering else []
    explanations = open_explanations_of(sae, config.explanations) if config.explanations else {}
    inputs = [
        open_artifact(path, kind)
        for path, kind in ((config.sae, "sae"), (config.explanations, "explanations"), (config.steering, "steering"))
        if path is not None
    ]
    ready = Latents(model, tokenizer, sae, config.prompts, config.factor, config.promoted)
    provenance = sae.cfg.provenance | {"sae_hash": sae.weights_hash}
    with building(config.out, "steerability", config, runtime, inputs, provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        found = measure(ready, sae.cfg.n_latents, config.rows, runtime)
        names: dict[str, Any] = {}
        if runtime.is_main:
            rows = validate(found, steered, config.resamples, config.seed) if config.steering else []
            columns = {name: getattr(found, name) for name in MEASURES}
            table = pa.table({"latent": np.arange(sae.cfg.n_latents, dtype=np.int32)} | columns, schema=STEERABILITY_SCHEMA)
            names[STEERABILITY_FILE] = parquet_bytes(STEERABILITY_SCHEMA, [table])
            names["steerability.md"] = as_table(found, explanations, rows).encode()
            if rows:
                names["validation.json"] = (json.dumps(rows, indent=1) + "\n").encode()
            for name, content in names.items():
                builder.publish(name, content)
        builder.finish(list(names), {"latents": sae.cfg.n_latents})
    log.info("%s: the table", config.out / "steerability.md")


def measure(ready: Latents, n_latents: int, rows: int, runtime: Runtime) -> Steerability:
    """The figures of all latents; ranks share the blocks."""
    blocks = [range(first, min(first + rows, n_latents)) for first in range(0, n_latents, rows)]
    own: list[tuple[int, TurnedUp]] = []
    with Progress("turning up", n_latents, "latents", runtime) as bar:
        for index in runtime.share(len(blocks)):
            own.append((index, ready.measure(blocks[index])))
            bar.update(runtime.world_size * len(blocks[index]))
    parts = sorted((part for rank in runtime.gather_objects(own) for part in rank), key=lambda part: part[0])
    columns = zip(*(figures for _, figures in parts), strict=True)
    return Steerability(*(torch.cat(column).float().numpy() for column in columns))


def as_table(found: Steerability, explanations: Mapping[int, Explanation], rows: Sequence[Mapping[str, Any]]) -> str:
    """The most steerable latents in Markdown, and how well the figures predict steering where that was measured."""
    order = found.order()[:SHOWN]
    head = "| latent | label | output score | its rise | change of confidence |\n" + "|---" * 5 + "|"
    lines = [f"# Which features steer\n\nThe {len(order)} of the largest output score.\n", head]
    for latent in order:
        title = title_of(explanations.get(latent)).replace("|", "\\|")
        figures = " | ".join(f"{value:.4f}" for value in found.of(latent).values())
        lines.append(f"| {latent} | {title} | {figures} |")
    if rows:
        lines += [
            f"\n## Against measured steering\n\n{rows[0]['features']} features, each at its best strength: what steering "
            "raised over random directions of the same length. Spearman with a 95 % bootstrap interval over features; the "
            "median effect of the tenth with the largest figure, that of all, and the share of that tenth above it.\n",
            "| figure | effect of steering | Spearman | top tenth | all | above |\n" + "|---" * 6 + "|",
        ]
    for row in rows:
        rho = row["spearman"]
        rank = f"{rho['value']:+.2f} ({rho['low']:+.2f} to {rho['high']:+.2f})" if rho else "-"
        middles = f"{100 * row['top_decile']:+.2f} % | {100 * row['median']:+.2f} % | {row['success']:.0%}"
        lines.append(f"| {NAMES[row['measure']]} | {NAMES[row['effect']]} | {rank} | {middles} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_stage(SteerabilityConfig, run, __doc__ or "")

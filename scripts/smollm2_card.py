"""The model card of the SAE of SmolLM2 that ships, from the folders that scripts.smollm2_sae wrote.

python -m scripts.smollm2_card --work runs/smollm2-sae
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture.store import open_activations
from core import files
from core.artifact import open_artifact
from core.cli import one_line_errors, parse
from interpretability.records import open_top, read_explanations
from sae.convert import fvu
from sae.model import SAE, load
from scripts.smollm2_sae import SHIPPED_SITE, SAEPathConfig

LICENCES = {
    "passages": "MIT, like the repository",
    "written": "written by SmolLM2-135M-Instruct itself (scripts/smollm2_written.py)",
    "speeches": "public domain; `nltk.download` of `state_union` and `inaugural`",
    "genesis": "public domain; `nltk.download` of `genesis`",
    "textbook": "OpenStax, Rice University, CC BY 4.0, used for training",
}
FIGURES = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_fraction": "latents that fire on none of these tokens",
    "ce_recovered": "CE recovered",
    "kl": "KL, nats per token",
    "fvu_pca": "FVU of PCA with as many components",
}
WHERE = {"training": "held-out documents of the sources below", "reviews": "film reviews, of which training saw none"}
LEAST_OURS = 0.5


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Where to read and write."""

    work: Path = SAEPathConfig.work
    """The folder that scripts.smollm2_sae worked in."""
    site: str = SHIPPED_SITE
    """Its site."""
    folder: Path | None = None
    """The folder that ships; `README.md` is written there. None: where scripts.smollm2_sae puts it."""


def sources(training: Path) -> list[tuple[str, str, int]]:
    """Name, licence and characters of each source, the largest first."""
    characters: Counter[str] = Counter()
    with training.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            characters[row["source"]] += len(row["text"])
    found = []
    for source, n in characters.most_common():
        kind, _, subject = source.partition("/")
        name = f"textbook: {subject.replace('-', ' ')}" if subject else source
        found.append((name, LICENCES[kind], n))
    return found


def shown_by_source(top: Path) -> dict[str, float]:
    """Share of the stored sentences by the first part of their document's name. ValueError where too few are our own."""
    opened = open_top(top)
    shown = (opened.sentences(latent) for latent in range(opened.n_latents))
    counts = Counter(sentence.document.partition(".")[0] for sentences in shown for sentence in sentences)
    shares = {name: n / counts.total() for name, n in counts.most_common()}
    if shares.get("passages", 0.0) < LEAST_OURS:
        raise ValueError(
            f"{top}: {shares.get('passages', 0.0):.0%} of its sentences are ours, expected {LEAST_OURS:.0%} at least"
        )
    return shares


def figures(evaluation: Path) -> dict[str, Any]:
    """The values of an evaluation by name, with the number of tokens."""
    path = open_artifact(evaluation, "evaluation").file("evaluation.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: found[name]["value"] for name in FIGURES} | {"tokens": found["fvu"]["conditions"]["tokens"]}


def card(config: CardConfig, folder: Path) -> str:
    of_site = config.work / config.site
    sae = load(folder / "sae")
    whole = fvu(load(of_site / "run" / "sae"), open_activations(of_site / "training-activations"))
    small = fvu(sae, open_activations(of_site / "training-activations"))
    measured = {name: figures(of_site / f"evaluation-{name}") for name in WHERE}
    lines = [*_head(sae, folder), *_quality(measured), ""]
    lines += [f"Stored in 8 bits with a scale per row: FVU {small:.4f}, in float32 {whole:.4f} (16,384 training rows).", ""]
    lines += ["## What it saw", "", "| text | share | licence |", "|---|---|---|"]
    found = sources(config.work / "training.jsonl")
    total = sum(n for _, _, n in found)
    lines += [f"| {name} | {n / total:.1%} | {licence} |" for name, licence, n in found]
    shares = ", ".join(f"{share:.0%} {name}" for name, share in shown_by_source(folder / "top").items())
    lines += [
        "",
        f"Others' texts are in the weights alone. The sentences that are stored and quoted here are {shares}; none "
        "shares a run of 8 words with the others' texts (tests/test_shared_runs.py).",
    ]
    return "\n".join([*lines, "", *_again(config)]) + "\n"


def _head(sae: SAE, folder: Path) -> list[str]:
    cfg, seen = sae.cfg, sae.cfg.provenance
    top, explanations = open_top(folder / "top"), read_explanations(folder / "explanations")
    valid = sum(explanation.state == "valid" for explanation in explanations.values())
    silent = sum(bool(top.silence(latent)) for latent in range(top.n_latents))
    return [
        "# An SAE of SmolLM2-135M-Instruct",
        "",
        "Made by this project; the model itself is fetched from the package index (docs/models.md).",
        "",
        "| | |",
        "|---|---|",
        f"| site | `{seen['site']}` |",
        f"| shape | {cfg.n_latents:,} latents, width {cfg.d_model}, {cfg.architecture}, k {cfg.k}, input norm `{cfg.norm}` |",
        f"| trained on | {seen['training_tokens']:,} tokens in {seen['training_steps']:,} steps, of "
        f"{seen['training_rows']:,} rows |",
        f"| labels | {valid:,} of {len(explanations):,} latents; {silent:,} fire in no sentence that is stored |",
        f"| maxima and densities | from {top.n_tokens:,} tokens of the training text |",
        "| licence | MIT; SmolLM2 is Apache-2.0 |",
        "",
    ]


def _quality(measured: dict[str, dict[str, Any]]) -> list[str]:
    head = " | ".join(f"{WHERE[name]} ({found['tokens']:,} tokens)" for name, found in measured.items())
    lines = ["## How good it is", "", f"| | {head} |", "|---|" + "---|" * len(measured)]
    for name, text in FIGURES.items():
        values = " | ".join("none" if found[name] is None else f"{found[name]:.4g}" for found in measured.values())
        lines.append(f"| {text} | {values} |")
    return lines


def _again(config: CardConfig) -> list[str]:
    site = "" if config.site == SHIPPED_SITE else f" --site {config.site}"
    return [
        "## How to make it again",
        "",
        f"    python -m scripts.smollm2_sae --texts CORPORA --max-units 24000{site}",
        f"    python -m scripts.smollm2_card{site}",
    ]


def main() -> None:
    with one_line_errors():
        config = parse(CardConfig, __doc__ or "")
        folder = config.folder or SAEPathConfig(texts=Path(), written=(), site=config.site).folder
        files.publish(folder / "README.md", card(config, folder).encode())
        print(folder / "README.md")


if __name__ == "__main__":
    main()

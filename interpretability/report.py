"""Top sentences and explanations -> a folder with one `report.html` that opens in any browser, without a server or a network.

    python -m interpretability.report --top top/ --explanations explanations/ --out report/
    python -m interpretability.report --top top/ --explanations explanations/ --out report/ --run run/ --evaluation evaluation/

`--run` adds the training curves and each feature's neighbours, `--evaluation` what the SAE costs and keeps, `--map` the map,
`--steerability` how well each feature steers.
The page holds the list of features; `features/` and `words/` beside it hold their evidence and the text that is searched, which
it loads when they are asked for, so that it stays usable with 65,536 features. `--one-file` puts all of that into the page.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.artifact import Artifact, Builder, building, check_provenance, open_artifact
from core.cli import Progress, StageConfig, run_stage
from core.lines import read_lines
from core.runtime import Runtime
from core.text import parse_json, read_text
from interpretability.causal.records import Steerability, read_steerability
from interpretability.map import MAP_FILE, read_map
from interpretability.map import page as map_page
from interpretability.pages.page import json_text, render
from interpretability.pages.report_features import (
    Features,
    best_of,
    density_histogram,
    nearest_that_fire,
    ranking,
    short,
    valid,
)
from interpretability.records import HISTOGRAM_FIRST_EXPONENT, NOT_SHOWN, Explanation, TopSentences, open_top, read_explanations
from sae.model import SAE
from sae.model import load as load_sae

REPORT_FILE = "report.html"
BLOCK = 64
"""Features whose evidence is one file: what is read to show one of them, some hundred kilobytes."""
WORDS_BLOCK = 4096
"""The same for the text that is searched."""
BEST_SENTENCES = 3
MAX_CURVE_POINTS = 400
BARS = {"fvu": "this SAE", "fvu_pca": "PCA", "fvu_mean": "mean of the rows", "fvu_random_sae": "random SAE"}
"""Figures of `evaluation.json` that are drawn side by side."""
HASHES = ("sae_hash", "model_hash", "corpus_hash", "statistics_corpus_hash")
FIGURES = {
    "explained_variance": ("Variance explained", True),
    "l0": ("Active latents a token", False),
    "dead_fraction": ("Dead latents", True),
    "ce_recovered": ("Cross-entropy recovered", True),
    "ce_clean": ("Cross-entropy of the model", False),
    "ce_sae": ("... with the SAE's reconstruction", False),
    "ce_zero": ("... with zeros", False),
    "kl": ("KL divergence", False),
    "cosine": ("Cosine with the original", False),
    "l2_ratio": ("Length over the original's", False),
}
"""Figures that are listed, and whether they are shares of one, shown in per cent."""

log = logging.getLogger("interpretability.report")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(StageConfig):
    """Flags of `python -m interpretability.report`."""

    top: Path
    """Folder written by interpretability.top_sentences."""
    explanations: Path
    """Folder written by interpretability.explain, of the same SAE."""
    out: Path
    """Folder to write."""
    run: Path | None = None
    """Folder of the training run (`metrics.jsonl`, `sae/`). None: no training curves and no neighbours."""
    evaluation: Path | None = None
    """Folder written by sae.evaluate. None: no evaluation in the report."""
    map: Path | None = None
    """Folder written by interpretability.map. None: no map beside the report."""
    steerability: Path | None = None
    """Folder written by interpretability.steerability. None: no figures of it on the cards."""
    best: int = 12
    """Features shown as cards above the list."""
    sentences: int = 8
    """Sentences shown of each feature, for each aggregation."""
    neighbours: int = 8
    """Latents named with each feature for the largest cosine of decoder rows."""
    one_file: bool = False
    """Put everything into report.html: one file to send, which opens more slowly with many features."""

    def __post_init__(self) -> None:
        if min(self.best, self.neighbours) < 0 or self.sentences < 1:
            raise ValueError(
                "--best and --neighbours must be at least 0 and --sentences at least 1; "
                f"found {self.best}, {self.neighbours} and {self.sentences}"
            )


@dataclass(frozen=True)
class Inputs:
    """The folders of a report, opened, and known to be of one SAE."""

    top: TopSentences
    explanations: dict[int, Explanation]
    sae: SAE | None
    curves: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    map: dict[str, Any] | None
    steerability: Steerability | None
    artifacts: list[Artifact]


def run(config: ReportConfig, runtime: Runtime) -> None:
    """Write the folder `config.out` of kind `report`."""
    inputs = open_inputs(config)
    with building(config.out, "report", config, runtime, inputs.artifacts, inputs.top.provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        names = _write(config, inputs, builder, runtime) if runtime.is_main else []
        builder.finish(names, {"latents": inputs.top.n_latents})
    page = config.out / REPORT_FILE
    log.info("%s: %s features, %.1f MB", page, f"{inputs.top.n_latents:,}", page.stat().st_size / 1e6)


def _write(config: ReportConfig, inputs: Inputs, builder: Builder, runtime: Runtime) -> list[str]:
    """Publish the page and the files beside it; returns their names."""
    top, sae = inputs.top, inputs.sae
    near = nearest_that_fire(sae.W_dec, top.firing_counts.tolist(), config.neighbours) if sae else None
    features = Features(top, inputs.explanations, near, config.sentences, inputs.steerability)
    inside: dict[str, str] = {}
    names = []

    def beside(name: str, value: Any) -> None:
        if config.one_file:
            inside[name] = json_text(value)
        else:
            names.append(f"{name}.js")
            builder.publish(names[-1], f'loaded("{name}",{json_text(value)});\n'.encode())

    with Progress("reading sentences", top.n_latents, "latents", runtime) as bar:
        for index, first in enumerate(range(0, top.n_latents, BLOCK)):
            latents = range(first, min(first + BLOCK, top.n_latents))
            beside(f"features/{index:05d}", features.block(latents))
            bar.update(len(latents))
    for index, first in enumerate(range(0, top.n_latents, WORDS_BLOCK)):
        beside(f"words/{index:05d}", features.words(range(first, min(first + WORDS_BLOCK, top.n_latents))))
    title = " · ".join(str(top.provenance[name]) for name in ("model", "site") if name in top.provenance)
    styles, scripts = ("theme.css", "report.css"), ("dom.js", "charts.js", "sentences.js", "report.js")
    page = render("report.html", title, contents(config, inputs, features), styles, scripts, inside)
    builder.publish(REPORT_FILE, page.encode())
    if inputs.map:
        builder.publish(MAP_FILE, map_page(inputs.map, REPORT_FILE).encode())
        names.append(MAP_FILE)
    return [*names, REPORT_FILE]


def open_inputs(config: ReportConfig) -> Inputs:
    """Open what the flags name. ValueError where a folder is damaged, or belongs to another SAE than the top sentences."""
    top = open_top(config.top)
    explained = open_artifact(config.explanations, "explanations")
    _check_sae(f"explanations {config.explanations}", top, explained.manifest.provenance)
    artifacts = [top.artifact, explained]
    sae = curves = evaluation = places = steerability = None
    if config.run:
        artifacts.append(open_artifact(config.run / "sae", "sae"))
        sae = load_sae(config.run / "sae")
        _check_sae(f"SAE {config.run / 'sae'}", top, {"sae_hash": sae.weights_hash})
        curves = read_curves(config.run / "metrics.jsonl")
    if config.evaluation:
        artifacts.append(open_artifact(config.evaluation, "evaluation"))
        _check_sae(f"evaluation {config.evaluation}", top, artifacts[-1].manifest.provenance)
        evaluation = read_evaluation(artifacts[-1].file("evaluation.json"))
    if config.map:
        artifacts.append(open_artifact(config.map, "map"))
        _check_sae(f"map {config.map}", top, artifacts[-1].manifest.provenance)
        places = read_map(config.map)
    if config.steerability:
        artifacts.append(open_artifact(config.steerability, "steerability"))
        steerability = read_steerability(config.steerability, str(top.provenance.get("sae_hash")))
    explanations = read_explanations(config.explanations)
    return Inputs(top, explanations, sae, curves, evaluation, places, steerability, artifacts)


def _check_sae(what: str, top: TopSentences, found: dict[str, Any]) -> None:
    check_provenance(what, top.provenance, found, ("sae_hash",))


def read_curves(path: Path) -> dict[str, Any]:
    """Loss, FVU and dead fraction over tokens, at most MAX_CURVE_POINTS of them, and every validation's FVU."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the metrics of sae.train; leave --run out for a report without them")
    lines = []
    for number, line in enumerate(read_lines(path, "leave --run out for a report without curves").records, 1):
        try:
            lines.append({name: line.get(name) for name in ("loss", "fvu", "dead_fraction", "val_fvu")} | {"x": line["tokens"]})
        except KeyError:
            raise ValueError(f"{path}: line {number} is no line of sae.train's metrics") from None
    step = math.ceil(len(lines) / MAX_CURVE_POINTS) or 1
    kept = [line for i, line in enumerate(lines) if i % step == 0 or i == len(lines) - 1]
    curves: dict[str, Any] = {name: _points(kept, name) for name in ("loss", "fvu", "dead_fraction")}
    return curves | {"val_fvu": _points(lines, "val_fvu")}


def _points(lines: Iterable[dict[str, Any]], name: str) -> list[list[float]]:
    return [[line["x"], short(line[name])] for line in lines if line[name] is not None]


def read_evaluation(path: Path) -> dict[str, Any]:
    """What sae.evaluate wrote, as the page shows it: `values` by name, `fvu` of the SAE and its rivals, a list of `figures`.

    A figure that does not exist (0 / 0), or that this evaluation does not have, is left out.
    """
    try:
        found = parse_json(read_text(path))
        values = {name: short(entry["value"]) for name, entry in found.items() if entry["value"] is not None}
        definitions = {name: str(entry["definition"]) for name, entry in found.items()}
        conditions: dict[str, Any] = next((entry["conditions"] for entry in found.values()), {})
        measured = f"{conditions['tokens']:,} tokens, {conditions['split']}" if conditions else ""
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path}: expected figures with value, definition and conditions, as sae.evaluate writes") from None
    return {
        "values": values,
        "fvu": [[text, values[name]] for name, text in BARS.items() if name in values],
        "figures": [
            [text, values[name], share, definitions[name]] for name, (text, share) in FIGURES.items() if name in values
        ],
        "conditions": measured,
    }


def contents(config: ReportConfig, inputs: Inputs, features: Features) -> dict[str, Any]:
    """All that the page itself holds, as JSON values; the features must have been read."""
    explanations = inputs.explanations
    order = ranking(explanations, features.evenness)
    return {
        "about": about(inputs),
        "latents": features.columns(),
        "hidden": [latent for latent in range(inputs.top.n_latents) if inputs.top.silence(latent) == NOT_SHOWN],
        "failed": [latent for latent in sorted(explanations) if not valid(explanations[latent])],
        "order": order,
        "best": features.best(best_of(order, explanations)[: config.best], BEST_SENTENCES),
        "block": BLOCK,
        "words_block": WORDS_BLOCK,
        "densities": density_histogram(row.density for row in features.statistics),
        "curves": inputs.curves,
        "evaluation": inputs.evaluation,
    }


def about(inputs: Inputs) -> dict[str, Any]:
    """Where the features come from."""
    top, provenance = inputs.top, inputs.top.provenance
    methods = Counter(explanation.method for explanation in inputs.explanations.values() if valid(explanation))
    return {
        "model": str(provenance.get("model", "")),
        "site": str(provenance.get("site", "")),
        "tokens": top.n_tokens,
        "sentences": top.n_sentences,
        "fired": int((top.firing_counts > 0).sum()),
        "k": inputs.sae.cfg.k if inputs.sae else None,
        "map": inputs.map is not None,
        "methods": [method for method, _ in methods.most_common()],
        "first_exponent": HISTOGRAM_FIRST_EXPONENT,
        "hashes": {name: provenance[name] for name in HASHES if name in provenance},
    }


if __name__ == "__main__":
    run_stage(ReportConfig, run, __doc__ or "")

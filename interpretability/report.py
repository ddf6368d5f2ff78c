"""Top sentences and explanations -> one `report.html` that opens in any browser, without a server and without a network.

    python -m interpretability.report --top top/ --explanations explanations/ --out report/
    python -m interpretability.report --top top/ --explanations explanations/ --out report/ --run run/ --evaluation evaluation/

`--run` adds the training curves and each feature's neighbours, `--evaluation` what the SAE costs and keeps. The page holds its
data as JSON, drawn by the script of `report_template.html`: columns with one entry a latent, and every sentence once.

Shapes: L latents, D model width.
"""

import html
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.artifact import Artifact, building, check_provenance, open_artifact
from core.cli import Progress, StageConfig, run_stage
from core.runtime import Runtime
from interpretability.records import (
    HISTOGRAM_FIRST_EXPONENT,
    Explanation,
    LatentStatistics,
    TopSentence,
    TopSentences,
    open_top,
    read_explanations,
)
from interpretability.search import nearest
from interpretability.words import names_content
from sae.model import SAE
from sae.model import load as load_sae

REPORT_FILE = "report.html"
SEPARATOR = "\x7f"
"""Between tokens of one string: JSON writes it as one byte, and text has no use for it."""
BINS_PER_DECADE = 4
MAX_CURVE_POINTS = 400
SENTENCES_COMPARED = 10
BARS = {"fvu": "this SAE", "fvu_pca": "PCA", "fvu_mean": "mean of the rows", "fvu_random_sae": "random SAE"}
"""Figures of `evaluation.json` that are drawn side by side."""
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
    best: int = 12
    """Features shown as cards above the list."""
    sentences: int = 5
    """Sentences in each feature's card."""
    cards: int = 8192
    """Features whose card holds sentences, best explained first; the rest are listed with their numbers alone. 0: all."""
    neighbours: int = 6
    """Latents named in each card for the largest cosine of decoder rows."""

    def __post_init__(self) -> None:
        if min(self.best, self.cards, self.neighbours) < 0 or self.sentences < 1:
            raise ValueError(
                "--best, --cards and --neighbours must be at least 0 and --sentences at least 1; "
                f"found {self.best}, {self.cards}, {self.neighbours} and {self.sentences}"
            )


@dataclass(frozen=True)
class Inputs:
    """The folders of a report, opened, and known to be of one SAE."""

    top: TopSentences
    explanations: dict[int, Explanation]
    sae: SAE | None
    curves: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    artifacts: list[Artifact]


def run(config: ReportConfig, runtime: Runtime) -> None:
    """Write the folder `config.out` of kind `report`."""
    inputs = open_inputs(config)
    with building(config.out, "report", config, runtime, inputs.artifacts, inputs.top.provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        if runtime.is_main:
            page = render(collect(config, inputs, runtime)).encode()
            builder.publish(REPORT_FILE, page)
        builder.finish([REPORT_FILE] if runtime.is_main else [], {"latents": inputs.top.n_latents})
    log.info("%s: %s features, %.1f MB", config.out / REPORT_FILE, f"{inputs.top.n_latents:,}", _size(config.out) / 1e6)


def _size(folder: Path) -> int:
    return (folder / REPORT_FILE).stat().st_size


def open_inputs(config: ReportConfig) -> Inputs:
    """Open what the flags name. ValueError where a folder is damaged, or belongs to another SAE than the top sentences."""
    top = open_top(config.top)
    explained = open_artifact(config.explanations, "explanations")
    _check_sae(f"explanations {config.explanations}", top, explained.manifest.provenance)
    artifacts = [top.artifact, explained]
    sae = curves = evaluation = None
    if config.run:
        artifacts.append(open_artifact(config.run / "sae", "sae"))
        sae = load_sae(config.run / "sae")
        _check_sae(f"SAE {config.run / 'sae'}", top, {"sae_hash": sae.weights_hash})
        curves = read_curves(config.run / "metrics.jsonl")
    if config.evaluation:
        artifacts.append(open_artifact(config.evaluation, "evaluation"))
        _check_sae(f"evaluation {config.evaluation}", top, artifacts[-1].manifest.provenance)
        evaluation = read_evaluation(artifacts[-1].file("evaluation.json"))
    explanations = read_explanations(config.explanations)
    return Inputs(top, explanations, sae, curves, evaluation, artifacts)


def _check_sae(what: str, top: TopSentences, found: dict[str, Any]) -> None:
    check_provenance(what, top.provenance, found, ("sae_hash",))


def read_curves(path: Path) -> dict[str, Any]:
    """Loss, FVU and dead fraction over tokens, at most MAX_CURVE_POINTS of them, and every validation's FVU."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the metrics of sae.train; leave --run out for a report without them")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            lines.append({name: line.get(name) for name in ("loss", "fvu", "dead_fraction", "val_fvu")} | {"x": line["tokens"]})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path}: line {number} is no line of sae.train's metrics") from None
    step = math.ceil(len(lines) / MAX_CURVE_POINTS) or 1
    kept = [line for i, line in enumerate(lines) if i % step == 0 or i == len(lines) - 1]
    curves: dict[str, Any] = {name: _points(kept, name) for name in ("loss", "fvu", "dead_fraction")}
    return curves | {"val_fvu": _points(lines, "val_fvu")}


def _points(lines: Iterable[dict[str, Any]], name: str) -> list[list[float]]:
    return [[line["x"], _short(line[name])] for line in lines if line[name] is not None]


def read_evaluation(path: Path) -> dict[str, Any]:
    """What sae.evaluate wrote, as the page shows it: `values` by name, `fvu` of the SAE and its rivals, a list of `figures`.

    A figure that does not exist (0 / 0), or that this evaluation does not have, is left out.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        values = {name: _short(entry["value"]) for name, entry in found.items() if entry["value"] is not None}
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


def collect(config: ReportConfig, inputs: Inputs, runtime: Runtime) -> dict[str, Any]:
    """All that the page shows, as JSON values."""
    top = inputs.top
    statistics = [top.statistics(latent) for latent in range(top.n_latents)]
    aggregation = "max" if "max" in top.aggregations else top.aggregations[0]
    n = max(config.sentences, SENTENCES_COMPARED)
    sentences: list[list[TopSentence]] = []
    evenness: list[float] = []
    with Progress("reading sentences", top.n_latents, "latents", runtime) as bar:
        for latent in range(top.n_latents):
            found = top.sentences(latent, aggregation, n)
            evenness.append(agreement([sentence.value for sentence in found]))
            sentences.append(found[: config.sentences])
            bar.update(1)
    order = ranking(inputs.explanations, evenness)
    shown = set(order[: config.cards] if config.cards else order)
    pool = SentencePool()
    return {
        "about": about(inputs),
        "latents": latent_columns(statistics, inputs.explanations),
        "order": order,
        "best": best_of(order, inputs.explanations)[: config.best],
        "top": [pool.add(row, statistics[i].max) if i in shown else [] for i, row in enumerate(sentences)],
        "pool": pool.columns(),
        "neighbours": nearest_that_fire(inputs.sae.W_dec, top.firing_counts.tolist(), config.neighbours)
        if inputs.sae
        else None,
        "densities": density_histogram(statistics),
        "curves": inputs.curves,
        "evaluation": inputs.evaluation,
    }


def about(inputs: Inputs) -> dict[str, Any]:
    """Where the features come from."""
    top, provenance = inputs.top, inputs.top.provenance
    methods = Counter(explanation.method for explanation in inputs.explanations.values() if _valid(explanation))
    return {
        "model": str(provenance.get("model", "")),
        "site": str(provenance.get("site", "")),
        "tokens": top.n_tokens,
        "sentences": top.n_sentences,
        "fired": int((top.firing_counts > 0).sum()),
        "k": inputs.sae.cfg.k if inputs.sae else None,
        "methods": [method for method, _ in methods.most_common()],
        "first_exponent": HISTOGRAM_FIRST_EXPONENT,
        "hashes": {name: provenance[name] for name in ("sae_hash", "model_hash", "corpus_hash") if name in provenance},
    }


def agreement(values: Sequence[float]) -> float:
    """How evenly the top sentences agree, 0 to 1: mean of their values over the largest, absent sentences counting as 0."""
    if not values or values[0] <= 0:
        return 0.0
    return sum(values[:SENTENCES_COMPARED]) / (SENTENCES_COMPARED * values[0])


def _valid(explanation: Explanation | None) -> bool:
    return explanation is not None and explanation.state == "valid"


def ranking(explanations: dict[int, Explanation], evenness: Sequence[float]) -> list[int]:
    """All latents, best first: those with a valid explanation by score, then by evenness; then the others."""

    def key(latent: int) -> tuple[bool, float, float, int]:
        explanation = explanations.get(latent)
        score = explanation.score if explanation and explanation.score is not None else -1.0
        return not _valid(explanation), -score, -evenness[latent], latent

    return sorted(range(len(evenness)), key=key)


def best_of(order: Sequence[int], explanations: dict[int, Explanation]) -> list[int]:
    """The explained latents in order, those named after words of meaning before grammar and pieces of words.

    Those score as high and say less.
    """
    valid = [latent for latent in order if _valid(explanations.get(latent))]
    return sorted(valid, key=lambda latent: not names_content(explanations[latent].title))


def latent_columns(statistics: Sequence[LatentStatistics], explanations: dict[int, Explanation]) -> dict[str, list[Any]]:
    """One list a column, one entry a latent."""
    nothing = Explanation(-1, "", "", "", "", "failed")
    explained = [explanations.get(row.latent, nothing) for row in statistics]
    return {
        "title": [item.title if _valid(item) else "" for item in explained],
        "explanation": [item.explanation if _valid(item) else item.reason for item in explained],
        "method": [item.method for item in explained],
        "score": [None if item.score is None else _short(item.score) for item in explained],
        "certainty": [None if item.certainty is None else _short(item.certainty) for item in explained],
        "firing": [row.firing_count for row in statistics],
        "sentences": [row.sentence_count for row in statistics],
        "density": [_short(row.density) for row in statistics],
        "max": [_short(row.max) for row in statistics],
        "mean": [_short(row.mean) for row in statistics],
        "histogram": [_without_zeros(row.histogram) for row in statistics],
        "promoted": [_joined(row.promoted) for row in statistics],
        "suppressed": [_joined(row.suppressed) for row in statistics],
    }


def _without_zeros(counts: Sequence[int]) -> list[int]:
    """Index of the first bin that is not empty, then the counts from there to the last such; empty where all are."""
    filled = [i for i, count in enumerate(counts) if count]
    return [filled[0], *counts[filled[0] : filled[-1] + 1]] if filled else []


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _joined(tokens: Iterable[str]) -> str:
    return SEPARATOR.join(token.replace(SEPARATOR, "\ufffd") for token in tokens)


class SentencePool:
    """Sentences that latents share, each held once."""

    def __init__(self) -> None:
        self._indices: dict[int, int] = {}
        self._tokens: list[str] = []
        self._documents: list[str] = []
        self._labels: list[str] = []

    def add(self, sentences: Iterable[TopSentence], maximum: float) -> list[list[int]]:
        """Per sentence: its index here, then position and activation (in thousandths of `maximum`) of each token that fires."""
        rows = []
        for sentence in sentences:
            index = self._indices.get(sentence.sentence_id)
            if index is None:
                index = self._indices[sentence.sentence_id] = len(self._tokens)
                self._tokens.append(_joined(sentence.tokens))
                self._documents.append(sentence.document)
                self._labels.append(sentence.label or "")
            row = [index]
            for position, value in enumerate(sentence.activations):
                if value > 0:
                    row += [position, min(1000, max(1, round(1000 * value / maximum)))]
            rows.append(row)
        return rows

    def columns(self) -> dict[str, list[str]]:
        return {"tokens": self._tokens, "document": self._documents, "label": self._labels}


def nearest_that_fire(directions: Tensor, firing_counts: Sequence[int], n: int) -> list[list[int]]:
    """For each row of `directions` (L, D), the `n` others of largest cosine: latent, thousandths of cosine, latent, ...

    Latents that never fire have no neighbours and are nobody's.
    """
    fires = torch.tensor(firing_counts).nonzero().squeeze(1)
    indices, cosines = nearest(directions[fires], torch.arange(len(fires)), n)
    pairs = torch.stack([fires[indices], (1000 * cosines).round().long()], dim=2).flatten(1)
    rows: list[list[int]] = [[] for _ in firing_counts]
    for latent, row in zip(fires.tolist(), pairs.tolist(), strict=True):
        rows[latent] = row
    return rows


def density_histogram(statistics: Iterable[LatentStatistics]) -> dict[str, Any]:
    """Latents by log10 of density, in bins of 1 / BINS_PER_DECADE; `first` is the lower edge of the first bin, in bins."""
    bins = Counter(math.floor(math.log10(row.density) * BINS_PER_DECADE) for row in statistics if row.density > 0)
    first, last = min(bins, default=0), max(bins, default=-1)
    return {"first": first, "per_decade": BINS_PER_DECADE, "counts": [bins[i] for i in range(first, last + 1)]}


def render(data: dict[str, Any]) -> str:
    """The page. Nothing of `data` can leave its place: inside JSON no `<` is left, and the script writes text, never markup."""
    template = resources.files("interpretability").joinpath("report_template.html").read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    title = " · ".join(part for part in (data["about"]["model"], data["about"]["site"]) if part)
    head, _, rest = template.partition("{{title}}")
    body, _, end = rest.partition("{{data}}")
    return f"{head}{html.escape(title)}{body}{text}{end}"


if __name__ == "__main__":
    run_stage(ReportConfig, run, __doc__ or "")

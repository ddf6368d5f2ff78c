"""What the report holds of each feature: columns of the page itself, and blocks of evidence that it loads when asked.

Shapes: L latents, D model width.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interpretability.causal.records import Steerability
from interpretability.records import (
    HISTOGRAM_BINS,
    HISTOGRAM_FIRST_EXPONENT,
    Explanation,
    LatentStatistics,
    TopSentence,
    TopSentences,
    title_of,
)
from interpretability.search import nearest

SEPARATOR = "\x7f"
"""Between tokens of one string: JSON writes it as one byte, and text has no use for it."""
BINS_PER_DECADE = 4
MORE = ("dominant_tokens", "patterns", "context")
"""What an explanation in the style `title` says beside its summary."""

Neighbours = Sequence[Sequence[tuple[int, int]]]


class Features:
    """The features of a folder of top sentences, read one after the other; what the whole list needs is kept by the way."""

    def __init__(
        self,
        top: TopSentences,
        explanations: Mapping[int, Explanation],
        near: Neighbours | None,
        n_sentences: int,
        steerability: Steerability | None = None,
    ) -> None:
        self.statistics: list[LatentStatistics] = []
        self._top, self._explanations, self._near, self._n = top, explanations, near, n_sentences
        self._steerability = steerability
        self._best_by = "max" if "max" in top.aggregations else top.aggregations[0]
        self._aggregations = sorted(top.aggregations, key=lambda name: name != self._best_by)

    def block(self, latents: Sequence[int]) -> dict[str, Any]:
        """Evidence of some latents, in order, and the sentences that they share."""
        pool = SentencePool()
        return {"features": [self._feature(latent, pool) for latent in latents], "pool": pool.columns()}

    def _feature(self, latent: int, pool: "SentencePool") -> dict[str, Any]:
        row, explanation = self._top.statistics(latent), self._explanations.get(latent)
        found = {name: self._top.sentences(latent, name, self._n) for name in self._aggregations}
        self.statistics.append(row)
        return {
            "explanation": said(explanation),
            "more": more(explanation),
            "method": explanation.method if explanation else "",
            "certainty": short_or_none(explanation.certainty) if explanation else None,
            "firing": row.firing_count,
            "sentences": row.sentence_count,
            "mean": short(row.mean),
            "histogram": without_zeros(row.histogram),
            "promoted": joined(row.promoted),
            "suppressed": joined(row.suppressed),
            "top": {name: pool.add(rows, row.max) for name, rows in found.items()},
            "levels": [[bin_, pool.add(rows, row.max)] for bin_, rows in by_level(self._top.levels(latent))],
            "ngrams": [[item["text"], item["count"]] for item in row.ngrams],
            "cofiring": [[item["latent"], round(1000 * item["jaccard"])] for item in row.cofiring],
            "near": self._near[latent] if self._near else [],
            "steers": {name: short(value) for name, value in self._steerability.of(latent).items()}
            if self._steerability
            else None,
        }

    def words(self, latents: Iterable[int]) -> list[str]:
        """What a search reads of each latent beside its title, in lower case; the latents must have been read."""
        texts = []
        for latent in latents:
            row, explanation = self.statistics[latent], self._explanations.get(latent)
            parts = [said(explanation), *(text for _, text in more(explanation)), *(token.strip() for token in row.promoted)]
            texts.append(" ".join(part for part in parts if part).lower())
        return texts

    def best(self, latents: Sequence[int], n: int) -> dict[str, Any]:
        """The `n` largest sentences of some latents that differ where it fires."""
        pool = SentencePool()
        found = [differing(self._top.sentences(latent, self._best_by), n) for latent in latents]
        rows = [pool.add(rows, self.statistics[latent].max) for latent, rows in zip(latents, found, strict=True)]
        return {"latents": list(latents), "examples": rows, "pool": pool.columns()}

    def columns(self) -> dict[str, list[Any]]:
        """One list a column, one entry a latent, of those that have been read."""
        explained = [self._explanations.get(row.latent) for row in self.statistics]
        return {
            "title": [title_of(item) for item in explained],
            "score": [short_or_none(item.score) if item else None for item in explained],
            "density": [short(row.density) for row in self.statistics],
            "max": [short(row.max) for row in self.statistics],
        }


def valid(explanation: Explanation | None) -> bool:
    return explanation is not None and explanation.state == "valid"


def said(explanation: Explanation | None) -> str:
    """The explanation, or why there is none."""
    if explanation is None:
        return ""
    return explanation.explanation if valid(explanation) else explanation.reason


def more(explanation: Explanation | None) -> list[list[str]]:
    """Name and text of what else an explainer said, where it is text."""
    rows = []
    for name in MORE:
        value = explanation.details.get(name) if explanation else None
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = ", ".join(value)
        if isinstance(value, str) and value:
            rows.append([name, value])
    return rows


def by_level(rows: Iterable[TopSentence]) -> list[tuple[int, list[TopSentence]]]:
    """Sentences by the bin of the histogram that their largest activation falls into, the highest bin first."""
    levels: dict[int, list[TopSentence]] = {}
    for row in rows:
        bin_ = min(HISTOGRAM_BINS - 1, max(0, math.floor(math.log2(row.value)) - HISTOGRAM_FIRST_EXPONENT))
        levels.setdefault(bin_, []).append(row)
    return sorted(levels.items(), reverse=True)


def differing(sentences: Iterable[TopSentence], n: int) -> list[TopSentence]:
    """The first `n` whose words around the largest token come in none before: corpora repeat themselves."""
    found: dict[tuple[str, ...], TopSentence] = {}
    for sentence in sentences:
        peak = sentence.activations.index(max(sentence.activations))
        found.setdefault(tuple(sentence.tokens[max(0, peak - 3) : peak + 4]), sentence)
    return list(found.values())[:n]


def without_zeros(counts: Sequence[int]) -> list[int]:
    """Index of the first bin that is not empty, then the counts from there to the last such; empty where all are."""
    filled = [i for i, count in enumerate(counts) if count]
    return [filled[0], *counts[filled[0] : filled[-1] + 1]] if filled else []


def short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def shortened(values: Mapping[str, float]) -> dict[str, float]:
    return {name: short(value) for name, value in values.items()}


def short_or_none(value: float | None) -> float | None:
    return None if value is None else short(value)


def joined(tokens: Iterable[str]) -> str:
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
                self._tokens.append(joined(sentence.tokens))
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


def nearest_that_fire(directions: Tensor, firing_counts: Sequence[int], n: int) -> list[list[tuple[int, int]]]:
    """For each row of `directions` (L, D), the `n` others of largest cosine: latent and thousandths of cosine.

    Latents that never fire have no neighbours and are nobody's.
    """
    fires = torch.tensor(firing_counts).nonzero().squeeze(1)
    indices, cosines = nearest(directions[fires], torch.arange(len(fires)), n)
    rows: list[list[tuple[int, int]]] = [[] for _ in firing_counts]
    for latent, near, values in zip(fires.tolist(), fires[indices].tolist(), (1000 * cosines).round().tolist(), strict=True):
        rows[latent] = [(other, int(value)) for other, value in zip(near, values, strict=True)]
    return rows


def density_histogram(densities: Iterable[float]) -> dict[str, Any]:
    """Latents by log10 of density, in bins of 1 / BINS_PER_DECADE; `first` is the lower edge of the first bin, in bins."""
    bins = Counter(math.floor(math.log10(density) * BINS_PER_DECADE) for density in densities if density > 0)
    first, last = min(bins, default=0), max(bins, default=-1)
    return {"first": first, "per_decade": BINS_PER_DECADE, "counts": [bins[i] for i in range(first, last + 1)]}

"""Latents whose meaning is known because it is written down: functions of the text, over the passages of the demo."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from core.artifact import building
from demo.corpus import passages
from interpretability.records import (
    HISTOGRAM_BINS,
    LATENT_SCHEMA,
    LATENTS_FILE,
    TOP_FILE,
    TOP_SCHEMA,
    parquet_bytes,
)
from interpretability.top_sentences import TopSentencesConfig
from tests.interp_folders import solo

_TOKEN = re.compile(r" ?[^\W\d_]+(?:'[a-z]+)?| ?\d+| ?[^\w\s]|\s+")
SHARDS = ("ing", "tion")


class Sentence(NamedTuple):
    """A sentence of a passage, with tokens as a tokenizer with a few endings of its own would cut it."""

    sentence_id: int
    text: str
    label: str
    document: str
    tokens: list[str]


Fires = Callable[[Sentence, int], float]


def sentences(n: int | None = None) -> list[Sentence]:
    """Sentences of the demo's passages, cut at full stops."""
    found: list[Sentence] = []
    for document in passages():
        for text in re.split(r"(?<=[.!?]) (?=[A-Z])", document.text):
            found.append(Sentence(len(found), text, str(document.label), document.name, list(_tokens(text))))
    return found[:n]


def _tokens(text: str) -> Sequence[str]:
    tokens: list[str] = []
    for token in _TOKEN.findall(text):
        ending = next((e for e in SHARDS if token.endswith(e) and len(token) > len(e) + 2), "")
        tokens += [token[: -len(ending)], ending] if ending else [token]
    return tokens


def on(*words: str) -> Fires:
    """Fires on these words, in any case."""
    return lambda s, i: 3.0 + len(s.tokens[i]) / 10 if s.tokens[i].strip().lower() in words else 0.0


def behind(previous: str, *words: str) -> Fires:
    """Fires on these words (on any, without) behind `previous`."""

    def fires(s: Sentence, i: int) -> float:
        bare = s.tokens[i].strip().lower()
        return 2.0 if i and s.tokens[i - 1].strip().lower() == previous and (bare in words or not words) else 0.0

    return fires


def where(label: str, test: Fires) -> Fires:
    """Only in sentences of this label."""
    return lambda s, i: test(s, i) if s.label == label else 0.0


def matching(pattern: str) -> Fires:
    """Fires on tokens that fit a regular expression from end to end, leading space apart."""
    compiled = re.compile(pattern)
    return lambda s, i: 1.5 + (i % 3) / 10 if compiled.fullmatch(s.tokens[i].strip()) else 0.0


def everywhere(s: Sentence, i: int) -> float:
    return 1.0 + i / 100


def first(s: Sentence, i: int) -> float:
    return 4.0 if i == 0 else 0.0


def write_top(path: Path, corpus: Sequence[Sentence], latents: Sequence[Fires], n: int, seed: int = 0) -> Path:
    """A folder of top sentences, by max, of the given latents; a little noise makes the order of equals arbitrary."""
    generator = np.random.default_rng(seed)
    n_tokens = sum(len(s.tokens) for s in corpus)
    rows, statistics = [], []
    for latent, fires in enumerate(latents):
        fired = []
        for s in corpus:
            values = np.array([fires(s, i) for i in range(len(s.tokens))])
            if values.any():
                fired.append((s, values * (1 + generator.random() / 5)))
        fired.sort(key=lambda item: (-item[1].max(), item[0].sentence_id))
        for rank, (s, values) in enumerate(fired[:n]):
            row = {"latent": latent, "aggregation": "max", "rank": rank, "value": values.max(), "activations": values.tolist()}
            rows.append(row | {key: getattr(s, key) for key in ("sentence_id", "document", "label", "text", "tokens")})
        every = np.concatenate([values[values > 0] for _, values in fired]) if fired else np.zeros(0)
        statistics.append(
            {
                "latent": latent, "firing_count": len(every), "sentence_count": len(fired), "max": every.max(initial=0),
                "mean": every.mean() if len(every) else 0, "density": len(every) / n_tokens,
                "histogram": [0] * HISTOGRAM_BINS, "promoted": [" and", " the"], "suppressed": [],
            }
        )  # fmt: skip
    config = TopSentencesConfig(
        sae=path, activations=path, model="", corpus=path, out=path, n=n, aggregations=("max",), n_promoted=2
    )
    with building(path, "top_sentences", config, solo(), provenance={"sae_hash": "written"}) as builder:
        builder.publish(TOP_FILE, parquet_bytes(TOP_SCHEMA, [pa.Table.from_pylist(rows, TOP_SCHEMA)]))
        builder.publish(LATENTS_FILE, parquet_bytes(LATENT_SCHEMA, [pa.Table.from_pylist(statistics, LATENT_SCHEMA)]))
        builder.finish([TOP_FILE, LATENTS_FILE], {"tokens": n_tokens, "sentences": len(corpus)})
    return path

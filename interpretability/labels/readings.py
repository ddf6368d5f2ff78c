"""Explanations that a reader wrote, from a file: whoever reads the sentences of a latent as a language model would.

A file of readings is one JSON object: `sae_hash`, the weights that were read; `reader`, who read; `readings`, a list of
`{"latent": 12, "title": "courts and trials", "explanation": "...", "words": ["court", "trial", "verdict"]}`. `words` are what
the reader expects in sentences in which the latent fires. They score the label like any other (`label_score`), on the top
sentences that readers do not see: those of odd rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from core.text import read_json
from interpretability.labels.token_statistics import TokenStatistics
from interpretability.records import Explanation

NAME = "reading"
KEYS = {"latent": int, "title": str, "explanation": str, "words": list}
MAX_TITLE_WORDS = 6


class Reading(NamedTuple):
    """What a reader says of a latent."""

    title: str
    explanation: str
    words: tuple[str, ...]


class Readings(NamedTuple):
    """A file of readings."""

    reader: str
    by_latent: dict[int, Reading]
    hash: str
    """Of the file's bytes."""


def read_readings(path: Path, sae_hash: str, n_latents: int) -> Readings:
    """The readings in a file. ValueError, naming the file, where it is none or belongs to another SAE."""
    content = read_json(path)
    if content.get("sae_hash") != sae_hash:
        raise ValueError(
            f"{path}: sae_hash is {content.get('sae_hash')!r}, but {sae_hash!r} is needed; these are readings of another SAE"
        )
    rows = content.get("readings")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: readings is {rows!r:.40}, expected a list")
    found: dict[int, Reading] = {}
    for number, row in enumerate(rows):
        latent, reading = _checked(f"{path}: readings[{number}]", row, n_latents)
        if latent in found:
            raise ValueError(f"{path}: readings[{number}]: a second reading of latent {latent}")
        found[latent] = reading
    return Readings(str(content.get("reader", "")), found, xxhash.xxh3_64_hexdigest(path.read_bytes()))


def _checked(where: str, row: Any, n_latents: int) -> tuple[int, Reading]:
    if not isinstance(row, dict) or set(row) != set(KEYS):
        raise ValueError(f"{where}: expected an object with the keys {', '.join(KEYS)}")
    for key, kind in KEYS.items():
        if type(row[key]) is not kind:
            raise ValueError(f"{where}: {key} is {row[key]!r:.40}, expected {kind.__name__}")
    if not 0 <= row["latent"] < n_latents:
        raise ValueError(f"{where}: latent {row['latent']}: expected one of 0 to {n_latents - 1}")
    if not 1 <= len(row["title"].split()) <= MAX_TITLE_WORDS:
        raise ValueError(f"{where}: title is {row['title']!r:.60}, expected 1 to {MAX_TITLE_WORDS} words")
    if not row["words"] or not all(isinstance(word, str) and word.strip() for word in row["words"]):
        raise ValueError(f"{where}: words is {row['words']!r:.60}, expected words that its sentences hold")
    return row["latent"], Reading(row["title"], row["explanation"], tuple(word.strip().lower() for word in row["words"]))


class Read:
    """The backend `token_statistics`, with the titles and explanations of `readings` where there are any."""

    def __init__(self, counted: TokenStatistics, readings: Readings) -> None:
        self._counted, self._readings = counted, readings

    name = NAME

    @property
    def model(self) -> str:
        """Who read."""
        return self._readings.reader

    def explain(self, latents: Sequence[int]) -> Iterator[Explanation]:
        """An explanation a latent, in order: by reading where it was read, else by counting."""
        for found in self._counted.explain(latents):
            reading = self._readings.by_latent.get(found.latent)
            yield self._by_reading(found, reading) if reading and found.state == "valid" else found

    def _by_reading(self, counted: Explanation, reading: Reading) -> Explanation:
        measured = self._counted.score_of(counted.latent, reading.words)
        details: Mapping[str, Any] = counted.details | {
            "read": {"words": list(reading.words)},
            "score": measured and {"name": "balanced accuracy", "pattern": ", ".join(reading.words)} | measured._asdict(),
        }
        return replace(
            counted,
            title=reading.title,
            explanation=reading.explanation,
            method=NAME,
            model=self.model,
            details=dict(details),
            score=round(measured.score, 4) if measured else None,
        )

"""Names the category of the words that a latent fires on, by the embeddings of the model itself: no other model is asked.

`categories.txt` lists categories with words that belong to each. Words are compared by the cosine of their embeddings, with the
mean of all words and the direction that they vary most in, which is about frequency, taken out (Mu and Viswanath 2018,
"All-but-the-Top", arXiv:1702.01417, with one direction). A category lies at the mean of its words.

Shapes: V vocabulary, D width of an embedding, C categories.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.text import lines, read_text
from interpretability.labels.words import distinct
from llama3 import Tokenizer

FILE = Path(__file__).parent / "categories.txt"
MIN_COSINE = 0.2
"""Cosine from which a word belongs to a category. In SmolLM2 84 % of the listed words reach it with their own category, of
whose mean they were left out, and 0.8 % with any other (docs/log.md, 2026-11-30)."""
MIN_WORDS = 3
"""Different words that must belong to a category for its name to be used."""
MIN_SHARE = 0.5
"""Share of the words' weight that must belong to it."""
MAX_ONE = 0.5
"""Share of the weight above which a single word is what the label is about, and not what it has in common with others."""
MAX_WORDS = 16
"""Words looked at, those of the largest weight."""
MAX_PIECES = 3
"""Tokens of a word, at most: more pieces say little about it."""
MIN_KNOWN = 0.5
"""Share of the listed words (`Categories.known`) that embeddings must know for their names to be used."""
_WHOLE = re.compile(r" [^\W\d_]{3,}")


class Category(NamedTuple):
    """What some words have in common."""

    name: str
    share: float
    """Of the words' weight, how much belongs to it."""
    words: tuple[str, ...]
    """Those that belong to it, the largest weight first."""


def read_categories(path: Path = FILE) -> dict[str, list[str]]:
    """The words of each category of a file, `name: word, word` a line; `#` begins a comment. ValueError names a bad line."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines(read_text(path)), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        words = [word.strip() for word in rest.split(",") if word.strip()]
        if not name.strip() or len(words) < MIN_WORDS or name.strip() in found:
            raise ValueError(f"{path}: line {number} is no category; expected `name: word, word, word`, found {line:.60}")
        found[name.strip()] = words
    return found


class Categories:
    """Categories placed among the embeddings (V, D) of a model."""

    @torch.no_grad()
    def __init__(self, embeddings: Tensor, tokenizer: Tokenizer, known: Mapping[str, list[str]]) -> None:
        self._embeddings, self._tokenizer = embeddings, tokenizer
        pieces = enumerate(tokenizer.pieces(range(tokenizer.n_vocab)))
        rows = embeddings[[i for i, piece in pieces if _WHOLE.fullmatch(piece)]].float()
        self._mean = rows.mean(0) if len(rows) else torch.zeros(embeddings.shape[1])
        self._main = _main_direction(rows - self._mean)
        self._vector = lru_cache(maxsize=1 << 16)(self._vector_of)
        vectors = {name: [v for word in words if (v := self._vector(word)) is not None] for name, words in known.items()}
        members = {name: torch.stack(found) for name, found in vectors.items() if found}
        self.names = list(members)
        sums = torch.stack([found.sum(0) for found in members.values()]) if members else torch.zeros(0, embeddings.shape[1])
        self._centres = F.normalize(sums, dim=1)  # (C, D)
        hits = [_nearest_to_own(found, self._centres, index) for index, found in enumerate(members.values())]
        self.known = float(torch.cat(hits).float().mean()) if hits else 0.0
        """Share of the listed words that are nearer to the others of their category than to any other category: 0.76 in
        SmolLM2, 0.25 in the embedded model."""

    def _vector_of(self, word: str) -> Tensor | None:
        """(D,) the direction of a word; None for one of too many pieces."""
        ids = self._tokenizer.encode(f" {word}")
        if not 0 < len(ids) <= MAX_PIECES:
            return None
        found = self._embeddings[ids].float().mean(0) - self._mean
        return F.normalize(found - found @ self._main * self._main, dim=0)

    @torch.no_grad()
    def alike(self, weights: Mapping[str, float]) -> set[str]:
        """Those of the words of the largest weight that lie within MIN_COSINE of the weighted mean of the others."""
        known, vectors, amounts = self._of_largest(weights)
        if len(known) < 2:
            return set()
        parts = amounts[:, None] * vectors
        others = F.normalize(parts.sum(0) - parts, dim=1)
        return {word for word, cosine in zip(known, (others * vectors).sum(1).tolist(), strict=True) if cosine >= MIN_COSINE}

    def _of_largest(self, weights: Mapping[str, float]) -> tuple[list[str], Tensor, Tensor]:
        """The MAX_WORDS words of the largest weight that have a direction, their directions (n, D) and weights (n,)."""
        ranked = sorted(weights, key=lambda word: (-weights[word], word))[:MAX_WORDS]
        known = {word: vector for word in ranked if (vector := self._vector(word)) is not None}
        vectors = torch.stack(list(known.values())) if known else torch.zeros(0, self._centres.shape[1])
        return list(known), vectors, torch.tensor([weights[word] for word in known])

    @torch.no_grad()
    def of(self, weights: Mapping[str, float]) -> Category | None:
        """The category nearest to the weighted mean of some words; None where few of them, or little of the weight,
        belong, or one word has most of it."""
        known, vectors, amounts = self._of_largest(weights)
        if len(known) < MIN_WORDS or not self.names:
            return None
        total = sum(sorted(weights.values())[-MAX_WORDS:])
        best = int((self._centres @ (amounts @ vectors)).argmax())
        cosines = vectors @ self._centres[best]
        inside = [word for word, cosine in zip(known, cosines.tolist(), strict=True) if cosine >= MIN_COSINE]
        share = sum(weights[word] for word in inside) / total
        if share < MIN_SHARE or max(weights.values()) > MAX_ONE * total:
            return None
        if len(distinct(iter(inside), MIN_WORDS)) < MIN_WORDS:
            return None
        return Category(self.names[best], share, tuple(inside))


def _nearest_to_own(members: Tensor, centres: Tensor, own: int) -> Tensor:
    """(n,) whether each of the `members` (n, D) of category `own` is nearest to it, left out of its mean itself."""
    cosines = members @ centres.T
    cosines[:, own] = (F.normalize(members.sum(0) - members, dim=1) * members).sum(1)
    return cosines.argmax(1) == own


def _main_direction(rows: Tensor) -> Tensor:
    """(D,) the unit direction in which `rows` (n, D), of mean zero, vary most, by power iteration."""
    found = F.normalize(rows.abs().mean(0), dim=0) if len(rows) else torch.zeros(rows.shape[1])
    for _ in range(50):
        found = F.normalize(rows.T @ (rows @ found), dim=0)
    return found

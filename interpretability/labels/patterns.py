"""What a latent fires on, as a pattern of whole words: which patterns its firings share, and how rare each is elsewhere.

A pattern is worth its coverage c (share of the latent's activation that it accounts for) times the information that it carries
about where the latent fires: the Kullback-Leibler divergence, in bits, of c from the pattern's base rate b among all words.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import NamedTuple

from interpretability.labels.words import Firing, Units, kinds_of

MAX_WORDS = 4
EXACT = ("word", "form", "after_word", "before_word", "first_word")
"""Kinds of pattern that name the words; the others say less: they must cover more and be worth more to be chosen."""
PIECES = ("start", "end", "inside")
VAGUE = 0.85
MIN_COVERAGE = 0.5
"""A pattern that accounts for less of the activation is no description of the latent."""
MIN_COVERAGE_VAGUE = 0.7
MIN_CONTEXT_COUNT = 20
"""Times that a word must occur elsewhere before we say that the latent wants it in one context only."""
MIN_ADDED = 0.05
"""Coverage that each further word of a pattern must add."""


class Pattern(NamedTuple):
    """`kind` says what `words` mean:

    word: any of them, lower case; form: this spelling; after_word: the second behind the first; before_word: the first before
    the second; after, before: anything behind or before it; start, end, inside: words with this piece, as it is spelt;
    kind: see `kinds_of`; first_word: this spelling at the start of the sentence; first, last: whatever stands there.
    """

    kind: str
    words: tuple[str, ...] = ()

    def fits(self, units: Units, index: int) -> bool:
        """Whether unit `index` is one that the pattern speaks of; for the kinds that do not name words."""
        match self.kind:
            case "after":
                return index > 0 and units.folded[index - 1] == self.words[0]
            case "before":
                return index + 1 < len(units.folded) and units.folded[index + 1] == self.words[0]
            case "kind":
                return self.words[0] in kinds_of(units, index)
            case "first" | "last":
                return index == (0 if self.kind == "first" else len(units.folded) - 1)
        assert self.kind in PIECES, self.kind
        return has_piece(self, units.surfaces[index])

    def present(self, units: Units) -> bool:
        """Whether some unit of a sentence fits."""
        match self.kind:
            case "word":
                return not set(self.words).isdisjoint(units.folded)
            case "form":
                return self.words[0] in units.surfaces
            case "after_word" | "before_word":
                return any(pair == self.words for pair in pairwise(units.folded))
            case "first_word":
                return units.surfaces[:1] == list(self.words)
        return any(self.fits(units, index) for index in range(len(units.folded)))


def has_piece(pattern: Pattern, surface: str) -> bool:
    """Whether a word starts with, ends in or holds the piece of a pattern of kind start, end or inside."""
    piece = pattern.words[0]
    if pattern.kind == "inside":
        return piece in surface
    return surface.startswith(piece) if pattern.kind == "start" else surface.endswith(piece)


def patterns_at(units: Units, index: int) -> Iterator[Pattern]:
    """The patterns of one word or position that fit a unit, but for those of pieces."""
    folded = units.folded[index]
    yield Pattern("word", (folded,))
    if units.surfaces[index] != folded:
        yield Pattern("form", (units.surfaces[index],))
    if index == 0:
        yield Pattern("first")
        yield Pattern("first_word", (units.surfaces[0],))
    else:
        yield Pattern("after", (units.folded[index - 1],))
        yield Pattern("after_word", (units.folded[index - 1], folded))
    if index == len(units.folded) - 1:
        yield Pattern("last")
    else:
        yield Pattern("before", (units.folded[index + 1],))
        yield Pattern("before_word", (folded, units.folded[index + 1]))
    for kind in kinds_of(units, index):
        yield Pattern("kind", (kind,))


def pieces_at(firing: Firing) -> Iterator[Pattern]:
    """The patterns of the token on which a latent fires, as a piece of words."""
    piece = firing.token.strip()
    if piece.isalpha():
        if firing.shard in ("whole", "start"):
            yield Pattern("start", (piece,))
        if firing.shard == "end":
            yield Pattern("end", (piece,))
        if firing.shard != "whole":
            yield Pattern("inside", (piece,))


class Presence(NamedTuple):
    """How many units of a sample fit a pattern, and the bit mask of the sentences that they are in: bit i for sentence i."""

    units: int
    mask: int


NOWHERE = Presence(0, 0)


class Sample:
    """Sentences against which patterns are held."""

    def __init__(self, sentences: Sequence[Units]) -> None:
        self.all = (1 << len(sentences)) - 1
        self.n_units = sum(len(units.folded) for units in sentences)
        counts: Counter[Pattern | str] = Counter()  # a bare string stands for a unit as it is spelt
        masks: defaultdict[Pattern | str, int] = defaultdict(int)
        for i, units in enumerate(sentences):
            for index, surface in enumerate(units.surfaces):
                keys: list[Pattern | str] = [surface, *patterns_at(units, index)]
                for key in keys:
                    counts[key] += 1
                    masks[key] |= 1 << i
        self._found = {key: Presence(count, masks[key]) for key, count in counts.items()}
        self._surfaces = [key for key in self._found if isinstance(key, str)]

    def presence(self, pattern: Pattern) -> Presence:
        """Where a pattern is found."""
        if pattern not in self._found:
            if pattern.kind in PIECES:
                self._found[pattern] = self._united([word for word in self._surfaces if has_piece(pattern, word)])
            elif pattern.kind == "word" and len(pattern.words) > 1:
                return self._united([Pattern("word", (word,)) for word in pattern.words])
        return self._found.get(pattern, NOWHERE)

    def _united(self, keys: Sequence[Pattern | str]) -> Presence:
        found = [self._found.get(key, NOWHERE) for key in keys]
        return Presence(sum(item.units for item in found), reduce(or_, (item.mask for item in found), 0))

    def base(self, pattern: Pattern) -> float:
        """Share of all units that fit, with half an occurrence added so that it is never 0."""
        return (self.presence(pattern).units + 0.5) / (self.n_units + 1)


@dataclass(frozen=True)
class Found:
    """A pattern with its coverage of the latent's activation, and its base rate."""

    pattern: Pattern
    coverage: float
    base: float

    @property
    def worth(self) -> float:
        """See the top of this file; in bits."""
        c, b = min(self.coverage, 0.999), self.base
        if c <= b:
            return 0.0
        bits = c * math.log2(c / b) + (1 - c) * math.log2((1 - c) / (1 - b))
        return c * bits * (1.0 if self.pattern.kind in EXACT else VAGUE)


class FiringSentence(NamedTuple):
    """A sentence in which a latent fires: its units, where it fires, and each firing's share of the sentence's activation."""

    units: Units
    firings: list[Firing]
    shares: list[float]


def best_pattern(sentences: Sequence[FiringSentence], sample: Sample) -> Found | None:
    """The pattern worth most among those that cover enough and occur in two sentences (in one, where there is but one)."""
    mass: defaultdict[Pattern, float] = defaultdict(float)
    support: defaultdict[Pattern, set[int]] = defaultdict(set)
    for i, sentence in enumerate(sentences):
        for firing, share in zip(sentence.firings, sentence.shares, strict=True):
            for pattern in (*patterns_at(sentence.units, firing.unit), *pieces_at(firing)):
                mass[pattern] += share / len(sentences)
                support[pattern].add(i)
    needed = min(2, len(sentences))
    shared = {pattern: share for pattern, share in mass.items() if len(support[pattern]) >= needed}
    found = [
        Found(pattern, share, sample.base(pattern))
        for pattern, share in shared.items()
        if share >= (MIN_COVERAGE if pattern.kind in EXACT else MIN_COVERAGE_VAGUE)
    ]
    found = [item for item in found if _in_context(item, shared, sample)] + list(_word_sets(shared, sample))
    return max(found, key=lambda item: (item.worth, item.pattern), default=None)


def _in_context(found: Found, mass: dict[Pattern, float], sample: Sample) -> bool:
    """Whether the context in a pattern of two words matters: the word is common without it, and the latent keeps to it."""
    if found.pattern.kind not in ("after_word", "before_word", "first_word"):
        return True
    position = 1 if found.pattern.kind == "after_word" else 0
    word = Pattern("word", (found.pattern.words[position].lower(),))
    if sample.presence(word).units < MIN_CONTEXT_COUNT:
        return False
    return (found.coverage / mass.get(word, 1.0)) / (found.base / sample.base(word)) >= 2


def _word_sets(mass: dict[Pattern, float], sample: Sample) -> Iterator[Found]:
    """Two to MAX_WORDS words together, the most covering first; each must add something."""
    words = [(share, pattern.words[0]) for pattern, share in mass.items() if pattern.kind == "word" and share >= MIN_ADDED]
    words.sort(key=lambda item: (-item[0], item[1]))
    for n in range(2, min(MAX_WORDS, len(words)) + 1):
        pattern = Pattern("word", tuple(word for _, word in words[:n]))
        coverage = sum(share for share, _ in words[:n])
        if coverage >= MIN_COVERAGE:
            yield Found(pattern, coverage, sample.base(pattern))

"""Sentences as whole words, numbers and signs, and model tokens mapped onto them: labels name words, not pieces of them."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

_UNIT = re.compile(r"[^\W\d_]\w*(?:['’][^\W\d_]+)*|\d+(?:[.,:]\d+)*|[^\w\s]|_+")
_YEAR = re.compile(r"1[0-9]\d\d|20\d\d")
_IDENTIFIER = re.compile(r"\w*[^\W\d]_\w+|\w*[a-z][A-Z]\w*")

_FUNCTION_WORDS = """
a about above across after again against all almost along already also although always am among an and another any are
around as at away back be became because become been before behind being below between both but by came can cannot come
could did do does doing done down during each either else enough even ever every few first for from further gave get give
go goes got had has have having he her here hers herself him himself his how however i if in indeed instead into is it its
itself just keep kept last least less let like made make many may me might mine more most much must my myself neither
never next no none nor not nothing now of off often on once one only onto or other others otherwise our ours out over own
per perhaps put quite rather said same say says see seen several shall she should since so some something soon still such
take taken than that the their theirs them themselves then there therefore these they this those though three through thus
to together too took toward towards two under until up upon us use used using very was we well went were what whatever
when where whether which while who whole whom whose why will with within without would yet you your yours yourself i'm
it's don't doesn't didn't isn't wasn't can't couldn't won't wouldn't that's there's i've he's she's they're we're you're
"""

FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""Words that say little about what a sentence is about."""

SIGN_NAMES = {
    ",": "comma", ".": "period", ";": "semicolon", ":": "colon", "?": "question mark", "!": "exclamation mark",
    "(": "opening bracket", ")": "closing bracket", "[": "opening bracket", "]": "closing bracket", '"': "quotation mark",
    "“": "opening quote", "”": "closing quote", "'": "apostrophe", "’": "apostrophe", "‘": "opening quote", "-": "hyphen",
    "–": "dash", "—": "dash", "/": "slash", "…": "ellipsis", "*": "asterisk", "=": "equals sign", "%": "percent sign",
    "&": "ampersand",
}  # fmt: skip
"""How a title speaks of a sign."""

_ENDINGS = {"", "s", "es", "'s", "’s", "d", "ed", "ing", "er", "ers", "ly", "y", "ies", "e", "n", "en"}

Shard = Literal["whole", "start", "end", "middle"]


class Units(NamedTuple):
    """The words, numbers and signs of a sentence, as written and in lower case."""

    surfaces: list[str]
    folded: list[str]


def units_of(text: str) -> Units:
    """Cut `text` into units."""
    surfaces = _UNIT.findall(text)
    return Units(surfaces, "\n".join(surfaces).lower().split("\n") if surfaces else [])


class Firing(NamedTuple):
    """A unit on which a latent fires."""

    unit: int
    """Its place in the sentence."""
    activation: float
    """The largest of its tokens."""
    token: str
    """That token, as the tokenizer writes it."""
    shard: Shard
    """Which part of the unit that token is."""


def firings(tokens: Sequence[str], activations: Sequence[float]) -> list[Firing]:
    """The units of the joined tokens with an activation above 0, in order. White space is no unit."""
    spans = [match.span() for match in _UNIT.finditer("".join(tokens))]
    starts = [start for start, _ in spans]
    token_ends = list(accumulate(map(len, tokens)))
    found: dict[int, Firing] = {}
    for i, activation in enumerate(activations):
        if activation <= 0 or not (bare := tokens[i].strip()):
            continue
        start = token_ends[i] - len(tokens[i].lstrip())
        index = bisect_right(starts, start) - 1
        if index < 0 or start >= spans[index][1]:
            continue
        if index not in found or activation > found[index].activation:
            found[index] = Firing(index, activation, tokens[i], _shard(start, start + len(bare), spans[index]))
    return [found[index] for index in sorted(found)]


def unit_at(tokens: Sequence[str], index: int) -> str:
    """The unit of the joined tokens in which token `index` begins, as written; empty where that token is white space."""
    start = sum(map(len, tokens[:index])) + len(tokens[index]) - len(tokens[index].lstrip())
    found = (match for match in _UNIT.finditer("".join(tokens)) if match.end() > start)
    unit = next(found, None)
    return unit.group() if unit and unit.start() <= start else ""


def _shard(start: int, end: int, unit: tuple[int, int]) -> Shard:
    if start <= unit[0]:
        return "whole" if end >= unit[1] else "start"
    return "end" if end >= unit[1] else "middle"


def kinds_of(units: Units, index: int) -> tuple[str, ...]:
    """What a unit is beside being a word: number, year, capitals, identifier (camelCase or with_underscores) or name.

    A name is capitalised and does not begin the sentence or a quotation.
    """
    surface = units.surfaces[index]
    if surface[0].isdigit():
        return ("number", "year") if _YEAR.fullmatch(surface) else ("number",)
    if not surface[0].isalpha():
        return ()
    if _IDENTIFIER.fullmatch(surface):
        return ("identifier",)
    if len(surface) > 1 and surface.isupper():
        return ("capitals",)
    before = units.surfaces[index - 1] if index else "."
    return ("name",) if surface[0].isupper() and surface != "I" and before[-1] not in '.!?"“‘:' else ()


def is_content(folded: str) -> bool:
    """Whether a word says what its sentence is about: a real word of three letters or more, and no function word."""
    return len(folded) > 2 and folded[0].isalpha() and folded not in FUNCTION_WORDS


def quoted_words(title: str) -> list[str]:
    """The whole words that a title quotes, as written."""
    return re.findall(r'"(\w+)"', title)


def names_content(title: str) -> bool:
    """Whether a title quotes words that all carry meaning: `"bread", "oven"`, not `"They"` or `words beginning "ab-"`."""
    words = quoted_words(title)
    return bool(words) and all(len(word) > 3 and is_content(word.casefold()) for word in words)


def akin(a: str, b: str) -> bool:
    """Whether two folded words are forms of one, such as soldier and soldiers: no title needs both."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rests = {a[shared:], b[shared:]}
    return rests <= _ENDINGS and (shared > 3 or rests & {"", "y"} != set())


def distinct(words: Iterator[str], n: int, taken: Sequence[str] = ()) -> list[str]:
    """The first `n` of `words` that are not akin to one another or to `taken`."""
    chosen: list[str] = []
    for word in words:
        if len(chosen) == n:
            break
        if not any(akin(word.lower(), other.lower()) for other in (*chosen, *taken)):
            chosen.append(word)
    return chosen


def spellings(words: Collection[str], sentences: Sequence[Units]) -> dict[str, str]:
    """How each of the folded `words` is most often written, within sentences if possible."""
    inside: Counter[tuple[str, str]] = Counter()
    for units in sentences:
        for i, (folded, surface) in enumerate(zip(units.folded, units.surfaces, strict=True)):
            if folded in words:
                inside[folded, surface] += 1 if i == 0 else 1000
    # The last to set a word is its most frequent spelling.
    return {folded: surface for (folded, surface), _ in reversed(inside.most_common())}

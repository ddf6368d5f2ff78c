"""Patterns and words as short English. In a title, quoted words are what a latent fires on; others tell of its sentences."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from interpretability.labels.categories import Category
from interpretability.labels.patterns import EXACT, Pattern
from interpretability.labels.words import SIGN_NAMES, distinct

MAX_TITLE_WORDS = 6
MAX_EXTRAS = 3

_KINDS = {"year": "years", "number": "numbers", "name": "names", "capitals": "words in capitals", "identifier": "identifiers"}


class Clues(NamedTuple):
    """What a title is made of beside the pattern."""

    topic: str | None
    category: Category | None
    """What the words that it fires on have in common, where that can be said and no pattern names them."""
    fired: list[str]
    """Content words that the latent fires on (those that fit the pattern), the most activation first. Without a pattern those
    that are no accident: it fires on them in two sentences, or they mean much the same as the others."""
    once: list[str]
    """These and the accidents."""
    apart: list[str]
    """Words that set its sentences apart, the strongest first."""
    common: list[str]
    """Those of them that are in a good share of the sentences."""
    surfaces: Mapping[str, str]
    """How a folded word is most often written where the latent fires."""
    spread: bool
    """Whether it fires on much of each sentence, and not on single words."""


def named(word: str, surfaces: Mapping[str, str]) -> str:
    """A word in quotation marks, a sign by its name."""
    if word in SIGN_NAMES:
        return SIGN_NAMES[word]
    return f'"{surfaces.get(word, word)}"'


def described(pattern: Pattern, surfaces: Mapping[str, str]) -> str:
    """A pattern in at most six words."""
    words = pattern.words
    match pattern.kind:
        case "word":
            shown = distinct(iter(words), MAX_EXTRAS)
            return ", ".join(dict.fromkeys(named(word, surfaces) for word in shown))
        case "form":
            return f'"{words[0]}"'
        case "after_word":
            return f"{named(words[1], surfaces)} after {named(words[0], {})}"
        case "before_word":
            return f"{named(words[0], surfaces)} before {named(words[1], {})}"
        case "after" | "before":
            return f"word {pattern.kind} {named(words[0], {})}"
        case "start":
            return f'words beginning "{words[0]}-"'
        case "end":
            return f'words ending "-{words[0]}"'
        case "inside":
            return f'words with "{words[0]}"'
        case "kind":
            return _KINDS[words[0]]
        case "first_word":
            return f"{named(words[0], {})} starting a sentence"
        case "first":
            return "first word of a sentence"
    assert pattern.kind == "last", pattern
    return "end of a sentence"


def in_words(pattern: Pattern, surfaces: Mapping[str, str]) -> str:
    """What the latent fires on, for use behind "fires on"."""
    text = described(pattern, surfaces)
    match pattern.kind:
        case "word":
            if len(pattern.words) > 1:
                return listed([named(word, surfaces) for word in pattern.words], "or")
            return f"the {text}" if pattern.words[0] in SIGN_NAMES else f"the word {text}"
        case "form" | "after_word" | "before_word" | "first_word" | "after" | "before":
            is_word = text.startswith('"')
            return f"the {'word ' if is_word else ''}{text}"
        case "first" | "last":
            return f"the {text}"
    return text


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def title_of(pattern: Pattern | None, clues: Clues) -> str:
    """At most MAX_TITLE_WORDS words on what a latent fires on and what its sentences are about."""
    if pattern is None:
        return _without_pattern(clues)
    if clues.category and {word.lower() for word in clues.category.words} >= set(pattern.words):
        return _of_category(clues.category, [word for word in clues.fired if word.lower() in pattern.words])
    head = described(pattern, clues.surfaces)
    taken = list(pattern.words)
    if clues.topic and clues.topic.lower() not in head.lower() and _fits(f"{head} / {clues.topic}"):
        head += f" / {clues.topic}"
        taken += clues.topic.split()
    if pattern.kind in ("first", "last"):
        return head
    return _with_words(head, ": ", clues.common if pattern.kind in EXACT else clues.fired, taken)


def _without_pattern(clues: Clues) -> str:
    topic = clues.topic if clues.topic and _fits(f"text about {clues.topic}") else None
    if topic and clues.spread:
        return _with_words(f"text about {topic}", ": ", clues.apart, topic.split())
    if clues.category:
        return _of_category(clues.category, clues.fired)
    quoted = [f'"{word}"' for word in distinct(iter(clues.fired), MAX_EXTRAS)]
    if topic:
        return _with_words(topic, ": ", [*quoted, *clues.apart], topic.split())
    if clues.spread and (words := [*clues.apart, *clues.fired]):
        return _with_words("text with", " ", words, [])
    if len(quoted) > 1:
        return f"{', '.join(quoted)} and others"
    if len(clues.common) > 1:
        return _with_words("in text with", " ", clues.common, [])
    common = [named(word, clues.surfaces) for word in distinct(iter(clues.once or clues.surfaces), MAX_EXTRAS)]
    return f"mixed: {', '.join(common)}" if common else "white space"


def _of_category(category: Category, recurring: Sequence[str]) -> str:
    """The name of a category and some of its words, those that recur first."""
    words = sorted(category.words, key=lambda word: word not in recurring)
    room = min(MAX_EXTRAS, MAX_TITLE_WORDS - len(category.name.split()))
    return f"{category.name}: " + ", ".join(f'"{word}"' for word in distinct(iter(words), room, category.name.split()))


def _with_words(head: str, joint: str, words: Sequence[str], taken: Sequence[str]) -> str:
    room = min(MAX_EXTRAS, MAX_TITLE_WORDS - len(head.split()))
    extras = distinct(iter(words), room, taken) if room > 0 else []
    return head + joint + ", ".join(extras) if extras else head


def _fits(title: str) -> bool:
    return len(title.split()) <= MAX_TITLE_WORDS

"""A judge that understands nothing: it compares words. What scores with it names its words; what scores without it means more.

detection  fires where the sentence holds a word that the description names
fuzzing    right where a marked word is one of them
rubric     3 where a marked word is one, 2 where the sentence holds one, 1 where it holds any word of meaning of the description
intruder   the sentence whose marked words are rarest among those of the others; of equals, whose words are; then the first

A description names what it quotes: words, or with a hyphen how they begin ("un-") or end ("-ing"). The first of its sentences
that quotes anything counts, as a rule its title; where none does, all words of meaning.
"""

import re
from collections.abc import Collection
from itertools import accumulate

from interpretability.judging.scoring_tasks import Example, Trial
from interpretability.labels.words import is_content, units_of
from interpretability.records import Named, named_in

_QUOTED = re.compile(r'"([^"]{1,60})"')
_SPANS = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> set[str]:
    return set(units_of(text).folded)


def named_by(explanation: str) -> Named:
    quoted = next(filter(None, map(_QUOTED.findall, explanation.split(". "))), None)
    if quoted is None:
        return Named({word for word in words_of(explanation) if is_content(word)})
    return named_in(quoted, words_of)


def _any_named(named: Named, words: Collection[str]) -> bool:
    return any(map(named.has, words))


def marked_words(example: Example) -> set[str]:
    """Whole words that hold a marked token."""
    ends = list(accumulate(map(len, example.tokens)))
    # White space at the start of a token belongs to the word before.
    marks = [(ends[i] - len(example.tokens[i].lstrip()), ends[i]) for i in example.marks]
    text = "".join(example.tokens)
    hit = [m.group() for m in _SPANS.finditer(text) if any(m.start() < end and begin < m.end() for begin, end in marks)]
    return {word for part in hit for word in words_of(part)}


def judge(trial: Trial, explanation: str) -> list[int]:
    """One answer an example, or the number of the intruder."""
    if trial.test == "intruder":
        return [_intruder(trial)]
    named = named_by(explanation)
    if trial.test == "detection":
        return [int(_any_named(named, words_of(example.text))) for example in trial.examples]
    if trial.test == "fuzzing":
        return [int(_any_named(named, marked_words(example))) for example in trial.examples]
    meaning = {word for word in words_of(explanation) if is_content(word)}
    grades = []
    for example in trial.examples:
        words = words_of(example.text)
        fits = (_any_named(named, marked_words(example)), _any_named(named, words), meaning & words)
        grades.append(next((3 - i for i, found in enumerate(fits) if found), 0))
    return grades


def _intruder(trial: Trial) -> int:
    marked = [marked_words(example) for example in trial.examples]
    content = [{word for word in words_of(example.text) if is_content(word)} for example in trial.examples]

    def company(sets: list[set[str]], i: int) -> float:
        others = [other for j, other in enumerate(sets) if j != i]
        return sum(bool(sets[i] & other) for other in others) / len(others)

    return min(range(len(marked)), key=lambda i: (company(marked, i), company(content, i), i)) + 1

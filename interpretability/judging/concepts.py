"""Lists of concepts, and whether an explanation names one.

A list is a text file, a concept a line: `name | text that is read | other names, by comma`. The text is the name where it is
left out; `#` begins a comment. `concepts/` beside this file holds the lists that ship.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from core.text import lines, read_text
from interpretability.labels.words import akin, units_of
from interpretability.records import Explanation

FOLDER = Path(__file__).parent / "concepts"
EXACT_LETTERS = 4
"""Words of fewer letters match as they are: "car" is not a form of "care"."""
_WORD = re.compile(r"\w")


class Concept(NamedTuple):
    """Something that a dictionary may or may not have a feature for."""

    list: str
    name: str
    text: str
    """What the model reads; the last token is looked at."""
    names: tuple[tuple[str, ...], ...]
    """The words, in lower case, of each name that an explanation may use."""


def read_concepts(paths: Sequence[Path]) -> list[Concept]:
    """The concepts of files, and of the `*.txt` of folders, in order. ValueError names a line that is none."""
    files = [file for path in paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    found: list[Concept] = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file; expected a list of concepts, one a line")
        for number, line in enumerate(lines(read_text(file)), 1):
            if line.strip() and not line.startswith("#"):
                found.append(_concept(file, number, line))
    if not found:
        raise ValueError(f"no concept in {', '.join(map(str, paths))}; expected files with one a line, or folders of *.txt")
    return found


def _concept(file: Path, number: int, line: str) -> Concept:
    name, text, others, *rest = *(part.strip() for part in line.split("|")), "", ""
    names = tuple(words for each in (name, *others.split(",")) if (words := words_of(each)))
    if not name or not names or len(rest) > 2:
        raise ValueError(f"{file}: line {number} is no concept; expected `name | text | other names`, found {line:.60}")
    return Concept(file.stem, name, text or name, names)


def words_of(text: str) -> tuple[str, ...]:
    """Its words and numbers in lower case, signs left out."""
    return tuple(unit for unit in units_of(text).folded if _WORD.match(unit))


def named_by(concept: Concept, explanation: Explanation) -> bool:
    """Whether all words of one of the concept's names stand in the explanation, in any form.

    Of `token_statistics` the title alone counts: its text also quotes the tokens that a latent promotes, and counts.
    """
    text = explanation.title if explanation.method == "token_statistics" else f"{explanation.title} {explanation.explanation}"
    words = set(words_of(text))
    return any(all(any(_same(word, other) for other in words) for word in name) for name in concept.names)


def _same(a: str, b: str) -> bool:
    return a == b or (min(len(a), len(b)) >= EXACT_LETTERS and akin(a, b))


def occurrences(concepts: Sequence[Concept], texts: Iterable[str]) -> tuple[list[int], int]:
    """How often each concept is named in `texts`, by all its names together, and the number of words there."""
    owners: dict[tuple[str, ...], set[int]] = {}
    for index, concept in enumerate(concepts):
        for name in concept.names:
            owners.setdefault(name, set()).add(index)
    # Most positions begin no name, and one look-up shows it.
    lengths: Mapping[str, set[int]] = {name[0]: set() for name in owners}
    for name in owners:
        lengths[name[0]].add(len(name))
    counts: Counter[int] = Counter()
    total = 0
    for text in texts:
        words = words_of(text)
        total += len(words)
        for i, word in enumerate(words):
            for n in lengths.get(word, ()):
                if i + n <= len(words):
                    counts.update(owners.get(words[i : i + n], ()))
    return [counts[index] for index in range(len(concepts))], total

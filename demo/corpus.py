"""The embedded corpus: passages written for this project, and documentation prose found on every machine.

python -m demo.corpus --out documents.jsonl     # what `python -m capture.sentences --source documents.jsonl` reads
python -m demo.corpus --check                   # how varied the passages are
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from capture.sources import Document
from core import files
from core.cli import one_line_errors, parse
from demo.documentation import documentation

PASSAGES = Path(__file__).parent / "data" / "passages.jsonl"
MORE_PASSAGES = PASSAGES.with_name("more_passages.jsonl")
"""On further topics: for real models. The embedded model's corpus stays what it was trained and evaluated on."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which documents to write where."""

    out: Path = Path("documents.jsonl")
    """File to write: a JSON object a line with text, name, source and label."""
    packages: tuple[str, ...] = ("python", "numpy", "networkx", "sympy", "torch")
    """Packages whose documentation joins the passages; none: the passages alone."""
    check: bool = False
    """Write nothing; print how varied the passages are."""


def passages(path: Path = PASSAGES) -> Iterator[Document]:
    """The passages of a file in demo/data, labelled with their topic and named after topic, style and number."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            parts = (row["topic"], row["style"], f"{number:04d}")
            yield Document("passages." + ".".join(parts).replace(" ", "_"), "passages", row["text"], row["topic"])


def all_passages() -> Iterator[Document]:
    """Every passage that was written for this project."""
    yield from passages()
    yield from passages(MORE_PASSAGES)


def topics() -> list[str]:
    """The topics of all passages, in their order."""
    return list(dict.fromkeys(document.label for document in all_passages() if document.label))


def documents(packages: tuple[str, ...] = CorpusConfig.packages) -> Iterator[Document]:
    """The passages, then the documentation of `packages`, labelled with nothing."""
    yield from passages()
    for item in documentation(packages):
        yield Document(item.name, f"documentation/{item.package}", item.text, None)


def write_documents(path: Path, written: Iterable[Document], shuffle: bool = False) -> int:
    """Write documents as JSON Lines, whole or not at all; returns their number. With `shuffle` in a random order, always the
    same, so that the beginning of the file is a fair sample of it."""
    found = list(written)
    if shuffle:
        random.Random(0).shuffle(found)
    lines = [json.dumps(document._asdict(), ensure_ascii=False).encode() + b"\n" for document in found]
    files.make_folder(path.parent)
    files.replace(path, lines)
    return len(lines)


def passage_statistics() -> dict[str, float | int | list[tuple[str, int]]]:
    """How varied the passages are: vocabulary, repeated 4-grams, and the words that open passages and sentences."""
    texts = [document.text for document in passages()]
    words = [re.findall(r"[a-z']+", text.lower()) for text in texts]
    grams: dict[tuple[str, ...], set[int]] = {}
    for number, row in enumerate(words):
        for start in range(len(row) - 3):
            grams.setdefault(tuple(row[start : start + 4]), set()).add(number)
    repeated = sum(len(where) > 1 for where in grams.values())
    openings = Counter(" ".join(text.split()[:3]).lower() for text in texts)
    first = Counter(s.split()[0].lower().strip('"') for text in texts for s in re.split(r"(?<=[.!?]) ", text))
    return {
        "passages": len(texts),
        "topics": len({document.label for document in passages()}),
        "words": sum(map(len, words)),
        "vocabulary": len({word for row in words for word in row}),
        "repeated_4gram_percent": round(100 * repeated / len(grams), 2),
        "same_first_three_words": sum(n for n in openings.values() if n > 1),
        "first_words_of_sentences": first.most_common(8),
    }


def main() -> None:
    with one_line_errors():
        config = parse(CorpusConfig, __doc__ or "")
        if config.check:
            print(json.dumps(passage_statistics(), indent=1))
        else:
            print(f"{config.out}: {write_documents(config.out, documents(config.packages)):,} documents")


if __name__ == "__main__":
    main()

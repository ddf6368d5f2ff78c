"""The documents that the SAEs of SmolLM2 are trained on, as JSON Lines for `python -m capture.sentences --source`.

python -m scripts.smollm2_documents --texts CORPORA --out training.jsonl
python -m scripts.smollm2_documents --texts CORPORA --written written.jsonl --out training.jsonl
python -m scripts.smollm2_documents --texts CORPORA --reviews --out reviews.jsonl    # the source held out of training
python -m scripts.smollm2_documents --texts CORPORA --written written.jsonl --shown --out shown.jsonl   # what may be quoted

CORPORA is a folder with `textbooks.jsonl.gz` (OpenStax, Rice University, CC BY 4.0), `state_union/`, `inaugural/`,
`genesis/` (public domain) and `movie_reviews.zip`; `nltk.download` fetches all but the first. Nothing of them is copied
into this repository. Our own passages are added from `demo/data/`, and what the model wrote itself from `--written`.
Whatever is committed quotes those two alone: `--shown` writes them, without what the model knows by heart of the others'
texts (a run of 8 words), and of the model's text a third at most, so that most of what is shown is ours.

Documents are written in a random order (`--seed`), so that any prefix of the file is a fair sample of all sources.
"""

import gzip
import json
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from capture.sources import Document
from core import files
from core.cli import one_line_errors, parse
from core.text import decode
from demo.corpus import all_passages

SPEECHES = ("state_union", "inaugural")
RUN = 8
"""Words in a row that two texts share only if one is taken from the other, or both from a third."""
OURS = 2 / 3


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """Which documents to write where."""

    texts: Path
    """Folder with the texts of others."""
    out: Path
    """File to write: one JSON object per line with text, name, source and label."""
    written: tuple[Path, ...] = ()
    """Files of texts that the model wrote itself (scripts.smollm2_written)."""
    shown: bool = False
    """Write what may be quoted instead of everything."""
    reviews: bool = False
    """Write the film reviews, the source that is held out of training, instead of everything else."""
    seed: int = 0
    """Seed of the order of documents."""

    def __post_init__(self) -> None:
        if self.shown and self.reviews:
            raise ValueError("--shown and --reviews: give one of them")


def textbooks(folder: Path) -> Iterator[Document]:
    """Sections of textbooks; source and label are the subject."""
    with gzip.open(folder / "textbooks.jsonl.gz", "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            yield Document(f"{row['label']}.{number:04d}.{row['name']}", f"textbook/{row['label']}", row["text"], row["label"])


def speeches(folder: Path) -> Iterator[Document]:
    """Addresses of US presidents; the label is the president, from file names such as 1945-Truman.txt or 1945-Truman-1.txt."""
    for kind in SPEECHES:
        for path in sorted((folder / kind).glob("*.txt")):
            president = path.stem.split("-")[1]
            yield Document(f"{kind}.{path.stem}", "speeches", unwrapped(read_text(path)), president)


def scripture(folder: Path) -> Iterator[Document]:
    """Genesis in two translations, in parts of some 6,000 characters; the label is the translation."""
    for name in ("kjv", "web"):
        paragraphs = unwrapped(read_text(folder / "genesis" / f"english-{name}.txt")).split("\n")
        part: list[str] = []
        parts = [part]
        for paragraph in paragraphs:
            if sum(map(len, part)) > 6000:
                parts.append(part := [])
            part.append(paragraph)
        for number, lines in enumerate(parts):
            yield Document(f"genesis.{name}.{number:03d}", "genesis", "\n".join(lines), name)


def reviews(folder: Path) -> Iterator[Document]:
    """Film reviews; the label is pos or neg."""
    with zipfile.ZipFile(folder / "movie_reviews.zip") as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".txt")):
            label = name.split("/")[-2]
            yield Document(f"reviews.{Path(name).stem}", "reviews", archive.read(name).decode("utf-8", "replace"), label)


def written(paths: Sequence[Path]) -> Iterator[Document]:
    """What the model wrote itself."""
    found = (line for path in paths for line in decode(path.read_bytes(), str(path)).split("\n") if line)
    for number, line in enumerate(found):
        row = json.loads(line)
        yield Document(f"written.{number:05d}", "written", row["text"], row.get("label"))


def others(folder: Path) -> Iterator[Document]:
    """Every text that is not ours."""
    for source in (textbooks, speeches, scripture, reviews):
        yield from source(folder)


def runs(text: str) -> set[int]:
    """A hash of each run of RUN words of a text, whatever their case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[start : start + RUN])) for start in range(len(words) - RUN + 1)}


def shown(config: DocumentsConfig) -> list[Document]:
    """Our passages, and of what the model wrote, in order, as much as keeps ours at OURS of the characters at least."""
    ours = list(all_passages())
    known: set[int] = set()
    for document in others(config.texts):
        known |= runs(document.text)
    room = sum(len(document.text) for document in ours) * (1 - OURS) / OURS
    for document in written(config.written):
        if known.isdisjoint(runs(document.text)):
            room -= len(document.text)
            if room < 0:
                break
            ours.append(document)
    return ours


def read_text(path: Path) -> str:
    """The text of a file that is UTF-8 or, as some of NLTK's are, Latin-1."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def unwrapped(text: str) -> str:
    """One paragraph per line, from text whose lines are wrapped and whose paragraphs are apart."""
    blocks = re.split(r"\n[ \t]*\n+", text.replace("\r\n", "\n"))
    return "\n".join(line for block in blocks if (line := " ".join(block.split())))


def documents(config: DocumentsConfig) -> list[Document]:
    """All documents of the configuration in their random order."""
    if config.reviews:
        found = list(reviews(config.texts))
    elif config.shown:
        found = shown(config)
    else:
        found = [*all_passages(), *textbooks(config.texts), *speeches(config.texts), *scripture(config.texts)]
        found += written(config.written)
    random.Random(config.seed).shuffle(found)
    return found


def main() -> None:
    with one_line_errors():
        config = parse(DocumentsConfig, __doc__ or "")
        found = documents(config)
        files.publish(config.out, [json.dumps(item._asdict(), ensure_ascii=False).encode() + b"\n" for item in found])
        characters: Counter[str] = Counter()
        for item in found:
            characters[item.source] += len(item.text)
        for source, n in characters.most_common():
            print(f"{source:<40} {n:>12,} characters  {n / characters.total():6.1%}")
        print(f"{config.out}: {len(found):,} documents, {characters.total():,} characters")


if __name__ == "__main__":
    main()

"""Sheets of top sentences for readers, without labels or statistics, and what two readers' judgments of them say.

python -m scripts.reading_sheets write --top demo/smollm2/top --latents 5,17-40 --out sheets/             # to be described
python -m scripts.reading_sheets write --top demo/smollm2/top --sample 100 --controls 20 --out sheets/    # to be judged
python -m scripts.reading_sheets judge --key docs/reading/key.json --judgments docs/reading/a.json docs/reading/b.json

A sheet shows the sentences of even rank, from which explanations are made; those of odd rank score them. The tokens that fire
stand in brackets, [[ ]] around those above half the sentence's maximum. A control has the sentences of one latent each, so
that they share nothing but chance. `key.json` says which item is which; readers do not get it.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import files
from core.cli import one_line_errors, parse
from core.text import read_json
from interpretability.explain import chosen
from interpretability.labels.token_statistics import split
from interpretability.records import TopSentence, TopSentences, open_top

PER_SHEET = 30
SENTENCES = 8
AROUND = 24
"""Tokens shown on each side of a sentence's peak."""
KINDS = ("concept", "word", "form", "none")
"""docs/reading/rubric.md says when an item is which."""


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Which latents to show, and where."""

    top: Path
    """Folder of top sentences."""
    out: Path
    """Folder to write: sheet-NN.md and key.json."""
    latents: str = ""
    """Latents to show, such as 0-99,205; the numbers stand on the sheets."""
    sample: int = 0
    """Latents drawn at random among those with enough sentences, shown without their numbers."""
    controls: int = 0
    """Items made of other latents' sentences, mixed in."""
    seed: int = 0
    """Of what is drawn, and of the order."""

    def __post_init__(self) -> None:
        if bool(self.latents) == bool(self.sample):
            raise ValueError("give either --latents or --sample")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What readers said."""

    key: Path
    """key.json of the sheets."""
    judgments: tuple[Path, Path]
    """A file per reader: a JSON object, item to one of concept, word, form, none."""


def shown(top: TopSentences, latent: int) -> list[TopSentence]:
    """What a reader sees of a latent."""
    return split(top.sentences(latent, "max"))[0][:SENTENCES]


def marked(sentence: TopSentence) -> str:
    """The tokens around the peak, those that fire in brackets."""
    maximum = max(sentence.activations)
    peak = sentence.activations.index(maximum)
    first, last = max(0, peak - AROUND), min(len(sentence.tokens), peak + AROUND + 1)
    pieces = []
    for token, value in zip(sentence.tokens[first:last], sentence.activations[first:last], strict=True):
        text = token.replace("\n", " ")
        space = text[: len(text) - len(text.lstrip())] if text.strip() else ""
        left, right = ("[[", "]]") if value > maximum / 2 else ("[", "]") if value > 0 else ("", "")
        pieces.append(f"{space}{left}{text[len(space) :]}{right}")
    return ("..." if first else "") + "".join(pieces).strip() + ("..." if last < len(sentence.tokens) else "")


def candidates(top: TopSentences) -> list[int]:
    """Latents with enough sentences to judge."""
    return [latent for latent in range(top.n_latents) if len(shown(top, latent)) == SENTENCES]


def drawn(top: TopSentences, config: WriteConfig) -> Iterator[tuple[dict[str, Any], list[TopSentence]]]:
    """The sampled latents and the controls, in random order."""
    draw = random.Random(config.seed)
    able = candidates(top)
    needed = config.sample + config.controls * SENTENCES
    if len(able) < needed:
        raise ValueError(f"{config.top}: {len(able)} latents with {SENTENCES} sentences to show, {needed} needed")
    latents = draw.sample(able, needed)
    items: list[dict[str, Any]] = [{"latent": latent} for latent in latents[: config.sample]]
    others = latents[config.sample :]
    items += [{"control": others[i * SENTENCES : (i + 1) * SENTENCES]} for i in range(config.controls)]
    draw.shuffle(items)
    for item in items:
        if "latent" in item:
            yield item, shown(top, item["latent"])
        else:
            yield item, [draw.choice(shown(top, latent)) for latent in item["control"]]


def write(config: WriteConfig) -> None:
    """The sheets and their key."""
    top = open_top(config.top)
    if config.latents:
        items = [({"latent": latent}, shown(top, latent)) for latent in chosen(config.latents, top.n_latents)]
    else:
        items = list(drawn(top, config))
    key: dict[str, Any] = {"sae_hash": top.provenance["sae_hash"], "seed": config.seed, "items": {}}
    texts = []
    for number, (item, sentences) in enumerate(items, 1):
        name = str(item["latent"]) if config.latents else str(number)
        key["items"][name] = item
        lines = [f"{i}. {marked(s)}" for i, s in enumerate(sentences, 1)]
        texts.append(f"## {name}\n\n" + "\n".join(lines) + "\n")
    config.out.mkdir(parents=True, exist_ok=True)
    for i in range(0, len(texts), PER_SHEET):
        files.replace(config.out / f"sheet-{i // PER_SHEET:02d}.md", "\n".join(texts[i : i + PER_SHEET]).encode())
    files.replace(config.out / "key.json", json.dumps(key, indent=1).encode() + b"\n")
    print(f"{config.out}: {len(texts)} items")


def kappa(left: Sequence[str], right: Sequence[str]) -> float:
    """Cohen's kappa (1960): agreement beyond what the two readers' shares give by chance; 1 where both always agree."""
    n = len(left)
    observed = sum(a == b for a, b in zip(left, right, strict=True)) / n
    counts = Counter(left), Counter(right)
    chance = sum(counts[0][kind] * counts[1][kind] for kind in counts[0]) / n**2
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def judge(config: JudgeConfig) -> dict[str, Any]:
    """Shares of each kind among latents and controls, by reader and where both agree; agreement and kappa."""
    items = read_json(config.key)["items"]
    judged = [_judgments(path, items) for path in config.judgments]
    found: dict[str, Any] = {}
    for name, of in (("latents", "latent"), ("controls", "control")):
        numbers = [number for number, item in items.items() if of in item]
        if not numbers:
            continue
        kinds = [[judgment[number] for number in numbers] for judgment in judged]
        both = sum(a == b == "concept" for a, b in zip(*kinds, strict=True))
        found[name] = {
            "items": len(numbers),
            "kinds": [{kind: kinds_of.count(kind) for kind in KINDS} for kinds_of in kinds],
            "concept by both": both,
        }
    left, right = ([judgment[number] for number in items] for judgment in judged)
    found["agreement"] = sum(a == b for a, b in zip(left, right, strict=True)) / len(items)
    found["kappa"] = kappa(left, right)
    found["kappa of concept or not"] = kappa(*([str(kind == "concept") for kind in kinds] for kinds in (left, right)))
    return found


def _judgments(path: Path, items: dict[str, Any]) -> dict[str, str]:
    found = read_json(path)
    if set(found) != set(items) or not set(found.values()) <= set(KINDS):
        wrong = sorted({*set(found) ^ set(items), *(number for number, kind in found.items() if kind not in KINDS)})
        raise ValueError(f"{path}: expected one of {', '.join(KINDS)} for each item of the key; wrong: {', '.join(wrong[:5])}")
    return found


def main() -> None:
    with one_line_errors():
        action, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
        if action == "judge":
            print(json.dumps(judge(parse(JudgeConfig, __doc__ or "", arguments)), indent=1))
        elif action == "write":
            write(parse(WriteConfig, __doc__ or "", arguments))
        else:
            raise ValueError(f"{action!r}: expected write or judge")


if __name__ == "__main__":
    main()

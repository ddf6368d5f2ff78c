"""Text that the model writes itself, as JSON Lines: part of what its SAEs are trained on, and free to be shown.

python -m scripts.smollm2_written --texts 8000 --out written.jsonl
python -m scripts.smollm2_written --texts 8000 --seed 1 --out more.jsonl     # other beginnings, on another machine

Half of the texts continue a beginning, half answer a question (scripts/smollm2_prompts.py), about the topics of our
passages. Killed at any moment, the same command continues, and the file is the same as without the kill; it can be read
at any time. A text is dropped where it

- is shorter than 40 words, once what follows its last whole sentence is cut off,
- loops: more than a fifth of its runs of 4 words stand earlier in it, or
- repeats others: more than a fifth of its runs of 8 words stand in texts before it.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.cli import Progress, StageConfig, machine, run_stage
from core.lines import LineWriter
from core.runtime import Runtime
from demo.corpus import topics
from llama3 import Message, Sampling, Tokenizer, Transformer, encode_dialog, generate, load_model, load_tokenizer
from llama3.chat import turn_ends
from scripts.smollm2_prompts import Prompt, prompts

MIN_WORDS = 40
LOOP, OTHERS = 4, 8
"""Words in a run, within a text and against the others."""
MOST_REPEATED = 0.2
ADVICE = "remove the file, or cut it before that line; the same command writes what is missing again"
WHOLE = re.compile(r".*[.!?][\"')\]]*(?=\s|$)", re.DOTALL)

log = logging.getLogger("scripts.smollm2_written")


@dataclass(frozen=True, kw_only=True)
class WrittenConfig(StageConfig):
    """How much to write where."""

    out: Path
    """File to write: one JSON object per line with text, label (the topic), kind, prompt, row and seed."""
    texts: int = machine(8000)
    """Texts to keep; a file that holds fewer is continued."""
    model: str = "smollm2"
    """Who writes."""
    batch: int = 64
    """Texts written at a time."""
    max_new_tokens: int = 256
    """Length of a text in tokens, at most."""
    temperature: float = 0.9
    """Temperature of sampling; top-p is 0.95."""

    def __post_init__(self) -> None:
        if min(self.texts, self.batch) < 1:
            raise ValueError(f"--texts and --batch must be at least 1; found {self.texts} and {self.batch}")


class Rules:
    """What is dropped, and why; remembers the texts that were kept."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def fault(self, text: str) -> str:
        """Why `text` is dropped: `short`, `loop` or `repeats others`; empty where it is kept."""
        words = words_of(text)
        if len(words) < MIN_WORDS:
            return "short"
        own = runs(words, LOOP)
        if 1 - len(set(own)) / len(own) > MOST_REPEATED:
            return "loop"
        among = runs(words, OTHERS)
        return "repeats others" if sum(run in self._known for run in among) > MOST_REPEATED * len(among) else ""

    def keep(self, text: str) -> None:
        self._known.update(runs(words_of(text), OTHERS))


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(words: Sequence[str], n: int) -> list[int]:
    """A hash of each run of `n` words."""
    return [hash(tuple(words[start : start + n])) for start in range(len(words) - n + 1)]


def whole_sentences(text: str) -> str:
    """`text` to the end of its last whole sentence; empty where there is none."""
    found = WHOLE.match(text.rstrip())
    return found[0].strip() if found else ""


class Writer:
    """The model with its tokenizer and how it samples."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: WrittenConfig) -> None:
        self._model, self._tokenizer, self._config = model, tokenizer, config

    def write(self, first: int, batch: Sequence[Prompt]) -> list[str]:
        """The text for each prompt of `batch`, of which `first` is the row of the first; a beginning stands before what
        continues it."""
        config, tokenizer = self._config, self._tokenizer
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            first_row=first,
            stop_ids=turn_ends(tokenizer),
        )
        texts = [prompt.text if prompt.kind == "continued" else "" for prompt in batch]
        for piece in generate(self._model, tokenizer, [self._ids(prompt) for prompt in batch], sampling):
            texts[piece.row] += piece.text
        return [whole_sentences(text) for text in texts]

    def _ids(self, prompt: Prompt) -> list[int]:
        if prompt.kind == "continued":
            return self._tokenizer.encode_prompt(prompt.text)
        return encode_dialog(self._tokenizer, [Message("user", prompt.text)])


def begun(lines: LineWriter, every: Sequence[Prompt], rules: Rules) -> int:
    """The row after the last one in the file. ValueError where other flags wrote it."""
    for record in lines.records:
        row = record.get("row", len(every))
        if row >= len(every) or every[row].text != record.get("prompt"):
            raise ValueError(f"{lines.path}: row {row} answers another prompt: another --seed wrote it; choose another --out")
        rules.keep(record["text"])
    return lines.records[-1]["row"] + 1 if lines.records else 0


def kept(writer: Writer, every: Sequence[Prompt], batch: int, after: int, rules: Rules) -> Iterator[tuple[int, str, str]]:
    """Row, text and fault of the prompts from row `after` on. Batches begin at multiples of their size, so that a text does
    not depend on where an earlier run was killed."""
    for first in range(after - after % batch, len(every), batch):
        for row, text in enumerate(writer.write(first, every[first : first + batch]), first):
            if row >= after:
                fault = rules.fault(text)
                if not fault:
                    rules.keep(text)
                yield row, text, fault


def run(config: WrittenConfig, runtime: Runtime) -> None:
    """Write texts until the file holds `config.texts`."""
    if runtime.world_size > 1:
        raise ValueError("scripts.smollm2_written is the work of one process; on several machines give each its own --seed")
    every, rules = prompts(topics(), config.seed), Rules()
    lines = LineWriter(config.out, ADVICE)
    after, n = begun(lines, every, rules), len(lines.records)
    if n < config.texts:
        writer = Writer(load_model(config.model, runtime.device), load_tokenizer(config.model), config)
        faults: Counter[str] = Counter()
        with Progress("written", config.texts - n, "texts", runtime) as bar:
            for row, text, fault in kept(writer, every, config.batch, after, rules):
                if fault:
                    faults[fault] += 1
                    continue
                prompt = every[row]
                record = {"text": text, "label": prompt.label, "kind": prompt.kind, "prompt": prompt.text, "row": row}
                lines.write(record | {"seed": config.seed})
                bar.update(1, **{name.replace(" ", "_"): count for name, count in faults.items()})
                n += 1
                if n == config.texts:
                    break
    log.info("%s: %s texts", config.out, f"{n:,}")
    if n < config.texts:
        log.warning("all %s prompts are used up; more texts need another --seed and --out", f"{len(every):,}")


if __name__ == "__main__":
    run_stage(WrittenConfig, run, __doc__ or "")

"""Continue texts in the terminal, steered or not, and watch features while it happens.

    python -m inference.complete --prompt "The sea was" [--steer recipe.json] [--watch 896,1204 --alarm 0.5] [--json]
    echo "The sea was" | python -m inference.complete          one prompt a line, any number of them

With --compare each prompt is continued twice, without and with the recipe. Texts, and the table of what was watched, go to
stdout, everything else to stderr; --json keeps texts apart that hold line breaks.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.cli import machine, run_stage
from core.runtime import Runtime
from core.terminal import json_line
from core.text import decode, lines
from inference.row import Row, grow, hooks_of, new_row
from inference.session import Session, open_session
from inference.steering import Recipe
from inference.terminal import Output, SamplingConfig, interruptible
from inference.watch import Watch
from llama3.generate import Sampling
from llama3.tokenizer import Bos

log = logging.getLogger("inference.complete")


@dataclass(frozen=True, kw_only=True)
class CompleteConfig(SamplingConfig):
    """Flags of `inference.complete`."""

    prompt: tuple[str, ...] = ()
    """Texts to continue. None given: one prompt a line from standard input."""
    whole: bool = False
    """Read standard input as one prompt, newlines included."""
    batch_size: int = machine(32)
    """Prompts continued at a time; a text does not depend on it."""
    bos: Bos = "auto"
    """Put BOS (<|begin_of_text|>) before each prompt: auto, as the model was trained; feed, always; none, never."""
    compare: bool = False
    """Continue each prompt without and with the recipe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and self.steer is None:
            raise ValueError("--compare: there is nothing to compare with; give --steer recipe.json too")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size: expected at least 1 prompt; found {self.batch_size}")


def run(config: CompleteConfig, runtime: Runtime) -> None:
    """Print a continuation for each prompt."""
    sampling = config.sampling()
    out = Output(config.raw)
    with interruptible():
        prompts = read_prompts(config)
        session = open_session(config, runtime.device)
        recipe = config.recipe(session)
        config.watcher(session)  # refuses a latent that does not exist before anything is printed
        rows = [new_row(session, prompt, session.tokenizer.encode_prompt(prompt, config.bos)) for prompt in prompts]
        recipes = [Recipe(), recipe] if config.compare else [recipe]
        for first in range(0, len(rows), config.batch_size):
            batch = rows[first : first + config.batch_size]
            _complete(config, session, recipes, batch, replace(sampling, first_row=first), out)


def read_prompts(config: CompleteConfig) -> list[str]:
    """The prompts of the flags, else of standard input; ValueError where there are none or they are no UTF-8."""
    if config.prompt:
        prompts = list(config.prompt)
    else:
        if sys.stdin is not None and sys.stdin.isatty():
            log.info("reading prompts, one a line, until Ctrl-D")
        text = decode(sys.stdin.buffer.read(), "standard input") if sys.stdin is not None else ""
        prompts = [text.rstrip("\n")] if config.whole else lines(text)
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("the prompt is empty; give --prompt TEXT, or one prompt a line on standard input")
    return prompts


def _complete(
    config: CompleteConfig, session: Session, recipes: Sequence[Recipe], batch: Sequence[Row], sampling: Sampling, out: Output
) -> None:
    """Continue the rows of one batch with each recipe, and print them: as they grow where there is one, else at their end."""
    streaming = len(batch) == 1 and not config.json
    done: list[tuple[Recipe, list[Row], Watch | None]] = []
    for recipe in recipes:
        rows = list(batch)
        watch = config.watcher(session, rows, sampling.first_row, out.fresh_line)
        hooks = hooks_of(session, recipe, rows, watch)
        if streaming:
            out.say(f"{_heading(config, recipe)}{rows[0].prompt}")
        for piece in grow(session, rows, sampling, hooks):
            if streaming:
                out.say(piece.text)
        if streaming:
            out.say("\n" + _table(session, rows[0], 0, watch))
        done.append((recipe, rows, watch))
    for index in [] if streaming else range(len(batch)):
        for recipe, rows, watch in done:
            row = rows[index]
            if config.json:
                out.say(json_line(_record(session, row, index, recipe, watch)) + "\n")
            else:
                out.say(f"{_heading(config, recipe)}{row.prompt}{row.text}\n{_table(session, row, index, watch)}")


def _heading(config: CompleteConfig, recipe: Recipe) -> str:
    return ("[steered] " if recipe.edits else "[baseline] ") if config.compare else ""


def _record(session: Session, row: Row, index: int, recipe: Recipe, watch: Watch | None) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": row.prompt, "completion": row.text, "finished": row.finished}
    record["steered"] = bool(recipe.edits)
    return record | (watch.result(session.tokenizer, row.ids, index).record() if watch else {})


def _table(session: Session, row: Row, index: int, watch: Watch | None) -> str:
    return f"{watch.result(session.tokenizer, row.ids, index)}\n" if watch else ""


if __name__ == "__main__":
    run_stage(CompleteConfig, run, __doc__ or "")

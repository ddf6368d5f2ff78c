"""Continue texts in the terminal, steered or not, and watch features while it happens.

    python -m inference.complete --prompt "The sea was" [--steer recipe.json] [--watch 896,1204 --alarm 0.5] [--json]
    echo "The sea was" | python -m inference.complete          one prompt a line, any number of them

With --compare each prompt is continued twice, without and with the recipe. Text goes to stdout, everything else to stderr.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.cli import machine, run_stage
from core.runtime import Runtime
from inference.session import InferenceConfig, Session, open_session
from inference.steering import Recipe, chain, check_all, hooks_for_all
from inference.watch import Alarm, Watch, parse_latents
from inference.workbench import Row, new_row
from llama3.generate import HooksFor, Sampling, generate

log = logging.getLogger("inference.complete")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(InferenceConfig):
    """Flags that say how tokens are chosen, shared by the terminal commands."""

    max_new_tokens: int = 64
    """New tokens per answer, at most; fewer where the context ends."""
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_p: float = 0.95
    """Keep the fewest tokens that together hold this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.1
    """Makes tokens that were there already less likely; 1 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    steer: Path | None = machine(None)
    """Recipe of edits, as the app saves it. None: no steering."""
    watch: str = ""
    """Latents of the first SAE to read at every token, such as 896,1204; empty watches none."""
    alarm: float | None = None
    """Warn where a watched latent exceeds this multiple of its maximum. None: never."""
    json: bool = machine(False)
    """Print one JSON object a line instead of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alarm is not None and not self.watch:
            raise ValueError("--alarm: no latent is watched; give --watch too")
        if self.alarm is not None and not self.alarm >= 0:
            raise ValueError(f"--alarm: expected a multiple of the maximum, 0 or more; found {self.alarm}")
        parse_latents(self.watch)

    def sampling(self) -> Sampling:
        """ValueError where a flag is out of range."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
        return Sampling(**{name: getattr(self, name) for name in names})

    def recipe(self, session: Session) -> Recipe:
        """The recipe of --steer, checked against the SAE; an empty one without the flag."""
        if self.steer is None:
            return Recipe()
        recipe = Recipe.read(self.steer)
        check_all(session.steerings(), recipe)
        return recipe

    def watcher(self, session: Session, first_row: int = 0) -> Watch | None:
        """What reads the latents of --watch in one batch, whose first prompt is number `first_row`, and logs its alarms; None
        without the flag."""
        latents = parse_latents(self.watch)
        if not latents:
            return None
        features = session.needs_features()

        def alarm(found: Alarm) -> None:
            label = features.label(found.latent) or "no label"
            log.warning(
                "ALARM prompt %d, token %d: latent %d (%s) is at %.3g, %.0f %% of its maximum",
                first_row + found.row, found.position, found.latent, label, found.value, 100 * found.share,
            )  # fmt: skip

        return Watch(features, latents, self.alarm, alarm)

    def hooks(self, session: Session, recipe: Recipe, rows: Sequence[Row], watch: Watch | None) -> HooksFor | None:
        """The recipe for every row, and the watch over what it leaves; None where there is neither."""
        steered = None
        if recipe.active:
            lengths = [row.prompt_length for row in rows]
            steered = hooks_for_all(session.steerings(), [recipe] * len(rows), lengths)
        return chain(steered, watch.hooks_for if watch else None)


@dataclass(frozen=True, kw_only=True)
class CompleteConfig(SamplingConfig):
    """Flags of `inference.complete`."""

    prompt: tuple[str, ...] = ()
    """Texts to continue. None given: one prompt a line from standard input."""
    whole: bool = False
    """Read standard input as one prompt, newlines included."""
    batch_size: int = machine(32)
    """Prompts continued at a time; a text does not depend on it."""
    bos: bool = True
    """Put <|begin_of_text|> before each prompt, as the model was trained."""
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
    prompts = read_prompts(config)
    session = open_session(config, runtime.device)
    recipe = config.recipe(session)
    config.watcher(session)  # refuses a latent that does not exist before anything is printed
    rows = [new_row(session, prompt, session.tokenizer.encode(prompt, bos=config.bos)) for prompt in prompts]
    with reader_may_leave():
        for steered in [False, True] if config.compare else [config.steer is not None]:
            shown = recipe if steered else Recipe()
            for first in range(0, len(rows), config.batch_size):
                batch = rows[first : first + config.batch_size]
                _complete(config, session, shown, batch, replace(sampling, first_row=first))


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End the block quietly where whoever reads our output has seen enough, such as `head`."""
    try:
        yield
    except BrokenPipeError:  # what Python still holds for it would fail again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_prompts(config: CompleteConfig) -> list[str]:
    """The prompts of the flags, else of standard input; ValueError where there are none or they are no UTF-8."""
    if config.prompt:
        prompts = list(config.prompt)
    else:
        if sys.stdin.isatty():
            log.info("reading prompts, one a line, until Ctrl-D")
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 text (byte {error.start}); convert it first") from None
        prompts = [text.rstrip("\n")] if config.whole else text.splitlines()
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("the prompt is empty; give --prompt TEXT, or one prompt a line on standard input")
    return prompts


def _complete(config: CompleteConfig, session: Session, recipe: Recipe, rows: Sequence[Row], sampling: Sampling) -> None:
    """Continue the rows of one batch, and print them: as they grow where there is one, else at their end."""
    rows = list(rows)
    watch = config.watcher(session, sampling.first_row)
    hooks = config.hooks(session, recipe, rows, watch)
    streaming = len(rows) == 1 and not config.json
    if streaming:
        _say(f"{_heading(config, recipe)}{rows[0].prompt}")
    for piece in generate(session.model, session.tokenizer, [row.ids for row in rows], sampling, hooks):
        rows[piece.row] = rows[piece.row].grown(piece)
        if streaming:
            _say(piece.text)
    if streaming:
        _say("\n")
    for index, row in enumerate(rows):
        if config.json:
            _say(json.dumps(_record(session, row, index, recipe, watch), ensure_ascii=False) + "\n")
            continue
        if not streaming:
            _say(f"{_heading(config, recipe)}{row.prompt}{row.text}\n")
        if watch:
            for line in watched_lines(session, row, index, watch):
                _say(line + "\n")


def _heading(config: CompleteConfig, recipe: Recipe) -> str:
    return ("[steered] " if recipe.edits else "[baseline] ") if config.compare else ""


def _record(session: Session, row: Row, index: int, recipe: Recipe, watch: Watch | None) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": row.prompt, "completion": row.text, "finished": row.finished}
    record["steered"] = bool(recipe.edits)
    return record | (watched_record(session, row, index, watch) if watch else {})


def watched_record(session: Session, row: Row, index: int, watch: Watch, start: int = 0) -> dict[str, Any]:
    """What a watch found in one row from the token `start` on, for JSON; an alarm names its token by its place in `tokens`."""
    values = {str(latent): watch.values(index, latent, len(row.ids))[start:] for latent in watch.latents}
    alarms = [
        {"token": alarm.position - start, "latent": alarm.latent, "value": alarm.value, "share_of_maximum": alarm.share}
        for alarm in watch.alarms
        if alarm.row == index and alarm.position >= start
    ]
    return {"tokens": session.tokenizer.pieces(row.ids[start:]), "watch": values, "alarms": alarms}


def watched_lines(session: Session, row: Row, index: int, watch: Watch, start: int = 0) -> Iterator[str]:
    """A table: one line a token from `start` on, one column a latent; a dot where it does not fire, blank where not read."""
    yield "  ".join([f"{'token':<16}", *(f"{'#' + str(latent):>9}" for latent in watch.latents)])
    values = [watch.values(index, latent, len(row.ids)) for latent in watch.latents]
    for position, piece in list(enumerate(session.tokenizer.pieces(row.ids)))[start:]:
        cells = ["" if v is None else "." if v == 0 else f"{v:.3f}" for v in (column[position] for column in values)]
        yield "  ".join([f"{piece.strip() or '␣':<16.16}", *(f"{cell:>9}" for cell in cells)])


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    run_stage(CompleteConfig, run, __doc__ or "")

"""What the terminal commands share: flags, watches, and how text and what was watched are printed."""

import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from core.cli import machine
from core.terminal import printable
from inference.recipes import SteeringConfig
from inference.row import Row
from inference.session import Session
from inference.steering import Recipe, chain, hooks_for_all
from inference.watch import Alarm, Watch, parse_latents
from inference.web.validation import unescaped
from llama3.generate import HooksFor, Sampling

log = logging.getLogger("inference")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SteeringConfig):
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
    """Strings that end an answer; \\n in one is a line break, \\t a tab."""
    watch: str = ""
    """Latents of the first SAE to read at every token, such as 896,1204; empty watches none."""
    alarm: float | None = None
    """Warn where a watched latent rises above this multiple of its maximum. None: never."""
    json: bool = machine(False)
    """Print one JSON object a line instead of text."""
    raw: bool = machine(False)
    """Into a pipe or file, print control characters as they are. A terminal would obey them, so there they are always shown as
    escapes such as \\x1b; JSON has escapes of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alarm is not None and not self.watch:
            raise ValueError("--alarm: no latent is watched; give --watch too")
        if self.alarm is not None and not self.alarm >= 0:
            raise ValueError(f"--alarm: expected a multiple of the maximum, 0 or more; found {self.alarm}")
        parse_latents(self.watch)

    def sampling(self) -> Sampling:
        """ValueError where a flag is out of range."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        return Sampling(**{name: getattr(self, name) for name in names}, stop=tuple(map(unescaped, self.stop)))

    def watcher(
        self, session: Session, rows: Sequence[Row] = (), first_row: int = 0, before: Callable[[], None] = lambda: None
    ) -> Watch | None:
        """What reads the latents of --watch while `rows`, the first of which is number `first_row` of all, are continued in
        place; None without the flag. Where a latent rises above --alarm, that is logged, after a call of `before`."""
        latents = parse_latents(self.watch)
        if not latents:
            return None
        features = session.needs_features()
        last: dict[tuple[int, int], int] = {}

        def alarm(found: Alarm) -> None:
            above = last.get((found.row, found.latent)) == found.position - 1
            last[found.row, found.latent] = found.position
            if not above:  # else it was said when it rose
                before()
                token = session.tokenizer.pieces([rows[found.row].ids[found.position]])[0]
                log.warning(
                    "ALARM text %d, token %d %r: latent %d (%s) is at %.3g, %.0f %% of its maximum",
                    first_row + found.row + 1, found.position, token, found.latent,
                    features.label(found.latent) or "no label", found.value, 100 * found.share,
                )  # fmt: skip

        return Watch(features, latents, self.alarm, alarm)

    def hooks(self, session: Session, recipe: Recipe, rows: Sequence[Row], watch: Watch | None) -> HooksFor | None:
        """The recipe for every row, and the watch over what it leaves; None where there is neither."""
        steered = None
        if recipe.active:
            lengths = [row.prompt_length for row in rows]
            steered = hooks_for_all(session.steerings(), [recipe] * len(rows), lengths)
        return chain(steered, watch.hooks_for if watch else None)


class Output:
    """Standard output, UTF-8 in a pipe. Control characters are shown as escapes; `raw` leaves them as they are in a pipe."""

    def __init__(self, raw: bool = False) -> None:
        if sys.stdout is None:
            raise ValueError("standard output is closed; expected a terminal, a file or a pipe")
        self._terminal = sys.stdout.isatty()
        self._raw = raw and not self._terminal
        self._open_line = False
        if isinstance(sys.stdout, io.TextIOWrapper):
            if self._terminal:
                sys.stdout.reconfigure(errors="replace")
            else:
                sys.stdout.reconfigure(encoding="utf-8")

    def say(self, text: str) -> None:
        """Print `text` at once."""
        if text:
            self._open_line = not text.endswith("\n")
            sys.stdout.write(text if self._raw else printable(text))
            sys.stdout.flush()

    def fresh_line(self) -> None:
        """On a terminal, where log lines stand between the text, end the line that was begun."""
        if self._terminal and self._open_line:
            self.say("\n")


@contextmanager
def interruptible() -> Iterator[None]:
    """At Ctrl-C end with exit code 130; nothing is there that the same command could continue."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def watched_record(session: Session, row: Row, index: int, watch: Watch, start: int = 0) -> dict[str, Any]:
    """What a watch found in one row from the token `start` on, for JSON; an alarm names its token by its place in `tokens`."""
    maxima = session.needs_features().max_values
    values = {str(latent): watch.values(index, latent, len(row.ids))[start:] for latent in watch.latents}
    alarms = [
        {"token": alarm.position - start, "latent": alarm.latent, "value": alarm.value, "share_of_maximum": alarm.share}
        for alarm in watch.alarms
        if alarm.row == index and alarm.position >= start
    ]
    return {
        "tokens": session.tokenizer.pieces(row.ids[start:]),
        "watch": values,
        "maxima": {str(latent): float(maxima[latent]) for latent in watch.latents},
        "alarms": alarms,
    }


def watched_lines(session: Session, row: Row, index: int, watch: Watch, start: int = 0) -> Iterator[str]:
    """A table: which latents these are, then a line a token from `start` on and a column a latent, with its value and that as a
    share of its maximum; a dot where it does not fire, blank where it is not read."""
    features = session.needs_features()
    maxima = [float(features.max_values[latent]) for latent in watch.latents]
    for latent, maximum in zip(watch.latents, maxima, strict=True):
        yield f"#{latent}: {features.label(latent) or 'no label'}; maximum {maximum:.3g}"
    yield "  ".join([f"{'token':<18}", *(f"{'#' + str(latent):>13}" for latent in watch.latents)])
    columns = [watch.values(index, latent, len(row.ids)) for latent in watch.latents]
    for position, piece in list(enumerate(session.tokenizer.pieces(row.ids)))[start:]:
        cells = [_cell(column[position], maximum) for column, maximum in zip(columns, maxima, strict=True)]
        yield "  ".join([f"{printable(piece.strip()) or '␣':<18.18}", *cells]).rstrip()


def _cell(value: float | None, maximum: float) -> str:
    if not value:
        return f"{'' if value is None else '.':>13}"
    return f"{value:7.3f}{f'{value / maximum:.0%}' if maximum > 0 else '':>6}"

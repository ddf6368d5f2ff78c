"""What the terminal commands share: flags, watches, and how text and what was watched are printed."""

import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from core.cli import machine
from core.terminal import printable
from inference.recipes import SteeringConfig
from inference.row import Row
from inference.session import Session
from inference.watch import Alarm, Watch, parse_latents
from inference.web.validation import unescaped
from llama3.generate import Sampling

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

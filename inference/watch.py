"""Watching latents while text is generated: a value per token, and an alarm above a threshold.

Shapes: B batch, T tokens of this pass, D model width, N = B * T, E latents watched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.terminal import printable
from inference.session import Features
from inference.steering import Reader
from llama3.sites import Hook
from llama3.tokenizer import Tokenizer

AT_ONCE = 64
"""Rows that are kept before they are read."""


class Alarm(NamedTuple):
    """A latent above the threshold."""

    row: int
    position: int
    latent: int
    value: float
    share: float
    """Of the latent's maximum."""


@dataclass(frozen=True, repr=False)
class Watched:
    """What a watch read in one text; prints as a table with a line per token."""

    tokens: tuple[str, ...]
    latents: tuple[int, ...]
    labels: tuple[str, ...]
    """The titles of the latents; empty strings where there are none."""
    maxima: tuple[float, ...]
    """The largest value of each latent on the corpus."""
    values: tuple[tuple[float | None, ...], ...]
    """For each latent its value at every token; None where it was not read."""
    alarms: tuple[Alarm, ...]
    """Above the threshold; `position` counts from the first of `tokens`."""

    def lines(self) -> Iterator[str]:
        """Which latents these are, then a line per token and a column per latent: its value, and that as a share of its
        maximum; a dot where it does not fire, blank where it was not read."""
        for latent, label, maximum in zip(self.latents, self.labels, self.maxima, strict=True):
            yield f"#{latent}: {label or 'no label'}; maximum {maximum:.3g}"
        yield "  ".join([f"{'token':<18}", *(f"{'#' + str(latent):>13}" for latent in self.latents)])
        for token, *row in zip(self.tokens, *self.values, strict=True):
            cells = map(_cell, row, self.maxima)
            yield "  ".join([f"{printable(token.strip()) or '␣':<18.18}", *cells]).rstrip()

    def record(self) -> dict[str, Any]:
        """The same for JSON; an alarm names its token by its place in `tokens`."""
        return {
            "tokens": list(self.tokens),
            "watch": {str(latent): list(row) for latent, row in zip(self.latents, self.values, strict=True)},
            "maxima": {str(latent): maximum for latent, maximum in zip(self.latents, self.maxima, strict=True)},
            "alarms": [
                {
                    "token": alarm.position,
                    "latent": alarm.latent,
                    "value": alarm.value,
                    "share_of_maximum": alarm.share,
                }
                for alarm in self.alarms
            ],
        }

    def __repr__(self) -> str:
        return "\n".join(self.lines())


def _cell(value: float | None, maximum: float) -> str:
    if not value:
        return f"{'' if value is None else '.':>13}"
    return f"{value:7.3f}{f'{value / maximum:.0%}' if maximum > 0 else '':>6}"


class Watch:
    """Reads `latents` at every token of one request: give `hooks_for` to `generate`, after the steering to read what it leaves.

    The last token of a text, which no forward pass follows, has no value. The attention sink at position 0 is not read.
    Activations are kept and read some at a time, since a single row costs nearly as much as many; an alarm is raised at its
    token, because a pre-activation below the threshold is known to raise none.
    """

    def __init__(
        self,
        features: Features,
        latents: Sequence[int],
        threshold: float | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
    ) -> None:
        """`threshold` in units of each latent's maximum; None raises no alarm. `on_alarm` is called with each as it is raised;
        `alarms` holds all of them. ValueError for a latent that does not exist, or, with a threshold, that never fired."""
        for latent in latents:
            if not 0 <= latent < features.n_latents:
                raise ValueError(f"--watch {latent}: out of range; this SAE has latents 0 to {features.n_latents - 1}")
            if threshold is not None and not float(features.max_values[latent]) > 0:
                raise ValueError(f"--watch {latent}: never fired on the corpus, so --alarm has no maximum to compare it with")
        self._features, self._threshold, self._on_alarm = features, threshold, on_alarm
        self.latents = tuple(latents)
        self.alarms: list[Alarm] = []
        device = features.sae.W_dec.device
        self._reader = Reader(features.sae, torch.tensor(self.latents, device=device))
        self._maxima = [float(features.max_values[latent]) for latent in latents]
        self._limits = 0.999 * (threshold or 0.0) * torch.tensor(self._maxima, device=device)  # room for rounding
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._values: dict[tuple[int, int], list[float]] = {}

    def hooks_for(self, positions: Tensor) -> Mapping[str, Hook]:
        """The reading hook of one pass over tokens at `positions` (B, T), -1 at padding."""
        return {self._features.site: partial(self._take, positions=positions)}

    def _take(self, x: Tensor, positions: Tensor) -> None:
        flat = x.flatten(0, 1).to(torch.float32, copy=True)
        self._waiting.append((positions, flat))
        alarming = self._threshold is not None and bool((self._reader.pre_activations(flat) > self._limits).any())
        if alarming or sum(len(rows) for _, rows in self._waiting) >= AT_ONCE:
            self._read()

    def _read(self) -> None:
        """Read what waits, in its order."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        values = iter(self._reader.values(torch.cat([flat for _, flat in waiting])).tolist())  # N rows of E
        for positions, _ in waiting:
            for row, line in enumerate(positions.tolist()):
                for position in line:
                    found = next(values)
                    if position > 0:
                        self._values[row, position] = found
                        self._judge(row, position, found)

    def _judge(self, row: int, position: int, values: Sequence[float]) -> None:
        if self._threshold is None:
            return
        for latent, value, maximum in zip(self.latents, values, self._maxima, strict=True):
            if value > self._threshold * maximum and value > 0:
                self.alarms.append(Alarm(row, position, latent, value, value / maximum))
                if self._on_alarm is not None:
                    self._on_alarm(self.alarms[-1])

    def values(self, row: int, latent: int, length: int) -> list[float | None]:
        """The latent's value at positions 0 to `length` - 1 of one row; None where it was not read."""
        self._read()
        at = self.latents.index(latent)
        found = [self._values.get((row, position)) for position in range(length)]
        return [None if values is None else values[at] for values in found]

    def result(self, tokenizer: Tokenizer, ids: Sequence[int], row: int = 0, start: int = 0) -> Watched:
        """What was read in one row, whose tokens are `ids`, from the token `start` on."""
        values = tuple(tuple(self.values(row, latent, len(ids))[start:]) for latent in self.latents)
        return Watched(
            tokens=tuple(tokenizer.pieces(ids[start:])),
            latents=self.latents,
            labels=tuple(map(self._features.label, self.latents)),
            maxima=tuple(self._maxima),
            values=values,
            alarms=tuple(
                alarm._replace(position=alarm.position - start)
                for alarm in self.alarms
                if alarm.row == row and alarm.position >= start
            ),
        )


def parse_latents(text: str) -> tuple[int, ...]:
    """Latents from `896,1204`; ValueError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise ValueError(f"--watch {text!r}: expected latents separated by commas, such as 896,1204")
    return tuple(dict.fromkeys(int(part) for part in parts))

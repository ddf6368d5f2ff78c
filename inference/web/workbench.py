"""What the app does, without the page: generation with and without a recipe side by side, and reading what was written."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inference.row import Row, new_row
from inference.session import Feature, Features, Session
from inference.steering import Recipe, hooks_for_all
from inference.web.validation import STRENGTH_STEP, STRENGTHS, Knobs, checked_recipe, split_prompts
from interpretability.records import trust
from llama3.generate import HooksFor, Piece, Sampling, generate

EDIT_SHARE = 0.4
REFRESH_S = 0.1
"""Least time between two snapshots of a running generation: the page needs no more."""


@dataclass(frozen=True)
class Snapshot:
    """Where a request stands. `steered` is None where the recipe changes nothing, since both columns would be the same."""

    baseline: tuple[Row, ...]
    steered: tuple[Row, ...] | None
    new_tokens: int = 0
    seconds: float = 0.0
    running: bool = True
    stopped: bool = False
    """Whether it was ended before its texts were."""

    def ended(self) -> "Snapshot":
        """This snapshot, now that no other will follow."""
        return replace(self, running=False, stopped=self.stopped or self.running)


@dataclass(frozen=True)
class Request:
    """A checked request: what `compare` runs."""

    rows: tuple[Row, ...]
    recipe: Recipe
    sampling: Sampling


def checked_request(session: Session, text: Any, recipe: Recipe, knobs: Knobs) -> Request:
    """Everything that can be refused is refused here, before the model runs."""
    prompts = split_prompts(text)
    sampling = knobs.checked()
    return Request(tuple(new_row(session, prompt) for prompt in prompts), checked_recipe(session, recipe), sampling)


def compare(session: Session, request: Request) -> Iterator[Snapshot]:
    """Generate without and with the recipe, a token here and a token there, from the same random numbers.

    Each column is a batch of its own, so that its text is what a lone run would give. Closing the iterator stops the work.
    """
    hooks = _hooks(session, request)
    columns = [list(request.rows)] if hooks is None else [list(request.rows), list(request.rows)]
    streams = [_stream(session, request, None)] + ([] if hooks is None else [_stream(session, request, hooks)])
    began = shown = time.monotonic()
    count = 0

    def snapshot(running: bool) -> Snapshot:
        steered = tuple(columns[1]) if len(columns) > 1 else None
        return Snapshot(tuple(columns[0]), steered, count, time.monotonic() - began, running)

    going = list(zip(columns, streams, strict=True))
    while going:
        for rows, stream in list(going):
            piece = next(stream, None)
            if piece is None:
                going.remove((rows, stream))
                continue
            rows[piece.row] = rows[piece.row].grown(piece)
            count += 1
        if count <= len(columns) or time.monotonic() - shown > REFRESH_S:
            shown = time.monotonic()
            yield snapshot(running=True)
    yield snapshot(running=False)


def answer(session: Session, request: Request) -> Iterator[Row]:
    """The first row of a request as it grows, with its recipe alone."""
    row = request.rows[0]
    shown = 0.0
    for piece in _stream(session, request, _hooks(session, request)):
        row = row.grown(piece)
        if time.monotonic() - shown > REFRESH_S:
            shown = time.monotonic()
            yield row
    yield row


def _hooks(session: Session, request: Request) -> HooksFor | None:
    if not request.recipe.active:
        return None
    lengths = [row.prompt_length for row in request.rows]
    return hooks_for_all(session.steerings(), [request.recipe] * len(lengths), lengths)


def _stream(session: Session, request: Request, hooks: HooksFor | None) -> Iterator[Piece]:
    return generate(session.model, session.tokenizer, [row.ids for row in request.rows], request.sampling, hooks)


def default_strength(features: Features, latent: int) -> float:
    """A strength that is felt and leaves the text readable: the edit is as long as EDIT_SHARE of a typical activation.

    Normalised activations have a mean norm of about sqrt(d_model) under both `dataset` and `layer`, and decoder rows have unit
    norm, so the length of the edit is strength * maximum there.
    """
    largest = float(features.max_values[latent])
    if largest <= 0 or features.sae.cfg.norm == "none":
        return 1.0
    strength = EDIT_SHARE * math.sqrt(features.sae.cfg.d_model) / largest
    return min(STRENGTHS[1], max(STRENGTH_STEP, round(strength / STRENGTH_STEP) * STRENGTH_STEP))


def confidence(features: Features, latent: int) -> float:
    """How far the label of a latent can be trusted (`trust`); 0 without one."""
    explanation = features.explanations.get(latent)
    return trust(explanation) if explanation is not None else 0.0


def heat(session: Session, rows: Sequence[Row], feature: Feature) -> list[list[float]]:
    """For each row, the feature's value at each token of its text, BOS left out, read on the unsteered model; 0 at position
    0, the attention sink."""
    values = [[0.0, *session.read(row.ids, feature.site).of(feature.latent)[1:]] for row in rows]
    return [row[session.lead :] for row in values]

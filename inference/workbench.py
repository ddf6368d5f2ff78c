"""What the app does, without the page: limits, feature search, and generation with and without a recipe side by side.

Every function takes what a client sent and checks it here, because a client need not be the page. Errors are one line.
"""

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from inference.session import Features, Session
from inference.steering import Edit, Recipe
from llama3.generate import HooksFor, Piece, Sampling, generate

MAX_PROMPTS = 8
MAX_PROMPT_CHARACTERS = 8_000
"""All prompts of a request together, counted before anything reads them."""
MAX_NEW_TOKENS = 512
STRENGTHS = (-10.0, 30.0)
"""Range of the strength in the app, in multiples of a latent's maximum."""
STRENGTH_STEP = 0.25
EDIT_SHARE = 0.4
MAX_RESULTS = 40
WORD = re.compile(r"\w+")
REFRESH_S = 0.1
"""Least time between two snapshots of a running generation: the page needs no more."""


class Hit(NamedTuple):
    """A feature that a search found."""

    latent: int
    label: str
    value: float
    """What it was ranked by, 0 to 1: share of the maximum for `firing_on`, cosine for `neighbours`, match for `search`."""
    token: str = ""
    """Where it fires most, for `firing_on`."""


@dataclass(frozen=True)
class Row:
    """One prompt and its continuation so far."""

    prompt: str
    ids: tuple[int, ...]
    """Token ids of prompt (BOS first) and continuation, end token left out."""
    prompt_length: int
    text: str = ""
    """The continuation."""
    finished: str = ""
    """Why it ended (`Piece.finished`); empty while it goes on."""

    def grown(self, piece: Piece) -> "Row":
        ids = self.ids if piece.finished == "stop" else (*self.ids, piece.token_id)
        return replace(self, ids=ids, text=self.text + piece.text, finished=piece.finished)


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


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Sampling as a client sends it; any field may hold anything until `checked` has seen it."""

    max_new_tokens: Any = 60
    temperature: Any = 0.8
    top_p: Any = 0.95
    repetition_penalty: Any = 1.1
    seed: Any = 0
    stop: tuple[str, ...] = field(default=())

    def checked(self) -> Sampling:
        """ValueError names the knob that is out of range."""
        tokens = whole("new tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        return Sampling(
            max_new_tokens=tokens,
            temperature=number("temperature", self.temperature, 0, 5),
            top_p=number("top-p", self.top_p, 0.01, 1),
            repetition_penalty=number("repetition penalty", self.repetition_penalty, 0.5, 5),
            seed=whole("seed", self.seed, 0, 2**31),
            stop=self.stop,
        )


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a number within the limits; ValueError for anything else, NaN included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}; found {value!r:.40}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """`value` as a whole number within the limits; a float that is whole will do, as JSON knows no difference."""
    value = number(name, value, low, high)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number; found {value!r}")
    return int(value)


def checked_latent(features: Features, value: Any) -> int:
    """A latent of this SAE, from a number or from text such as "896" or "#896"."""
    if isinstance(value, str) and value.strip().lstrip("#").isdecimal() and len(value) < 20:
        value = int(value.strip().lstrip("#"))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise ValueError(f"a latent is a whole number from 0 to {features.n_latents - 1}; found {value!r:.40}")
    if not 0 <= value < features.n_latents:
        raise ValueError(f"latent {value!r:.40} is out of range; this SAE has latents 0 to {features.n_latents - 1}")
    return value


def checked_edit(features: Features, latent: Any, strength: Any, mode: Any, positions: Any) -> Edit:
    """One edit as the page describes it; `positions` may be text such as "12" or "from 12"."""
    index = checked_latent(features, latent)
    amount = number(f"latent {index}: strength", strength, *STRENGTHS)
    if isinstance(positions, str) and (word := positions.strip().removeprefix("from").strip()).isdecimal() and len(word) < 10:
        positions = int(word)
    return Edit(latent=index, strength=amount, mode=mode, positions=positions)


def checked_recipe(features: Features, recipe: Recipe) -> Recipe:
    """A recipe that this SAE can follow, within the app's limits."""
    for edit in recipe.edits:
        checked_edit(features, edit.latent, edit.strength, edit.mode, edit.positions)
    features.steering.check(recipe)
    return recipe


def split_prompts(text: Any) -> list[str]:
    """One prompt a line, empty lines left out."""
    if not isinstance(text, str):
        raise ValueError(f"prompts must be text; found {type(text).__name__}")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"prompts may hold {MAX_PROMPT_CHARACTERS:,} characters together; found {len(text):,}")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("the prompt is empty; write the beginning of a text, one prompt a line")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts at once, one a line; found {len(prompts)}")
    return prompts


def checked_request(session: Session, text: Any, recipe: Recipe, knobs: Knobs) -> Request:
    """Everything that can be refused is refused here, before the model runs."""
    prompts = split_prompts(text)
    sampling = knobs.checked()
    if recipe.edits:
        checked_recipe(session.needs_features(), recipe)
    rows = tuple(new_row(session, prompt) for prompt in prompts)
    return Request(rows, recipe, fitted(session, sampling, rows))


def new_row(session: Session, prompt: str, ids: Sequence[int] | None = None) -> Row:
    """A row about to be continued; `ids` where the prompt is more than BOS and its text."""
    ids = session.tokenizer.encode(prompt, bos=True) if ids is None else ids
    if len(ids) >= session.context:
        raise ValueError(
            f"a prompt has {len(ids):,} tokens, but the context holds {session.context:,} with the answer; shorten it: "
            f"{prompt:.40}"
        )
    return Row(prompt, tuple(ids), len(ids))


def fitted(session: Session, sampling: Sampling, rows: Sequence[Row]) -> Sampling:
    """`sampling` with no more new tokens than the longest row leaves room for in the context."""
    room = session.context - max(row.prompt_length for row in rows)
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


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
    return session.needs_features().steering.hooks_for([request.recipe] * len(lengths), lengths)


def _stream(session: Session, request: Request, hooks: HooksFor | None) -> Iterator[Piece]:
    return generate(session.model, session.tokenizer, [row.ids for row in request.rows], request.sampling, hooks)


def search(features: Features, query: Any, n: int = MAX_RESULTS) -> list[Hit]:
    """Features whose label or explanation matches the words of `query`, best first; a number finds that latent.

    An empty query gives the best explained features.
    """
    if not isinstance(query, str) or len(query) > 300:
        raise ValueError("a search takes up to 300 characters of text")
    text = query.strip().lower()
    if text.lstrip("#").isdecimal():
        latent = checked_latent(features, text)
        return [Hit(latent, features.label(latent), 1.0)]
    words = text.split()
    found = []
    for latent, explanation in features.explanations.items():
        if explanation.state != "valid":
            continue
        title, body = explanation.title.lower(), explanation.explanation.lower()
        matches = [_word_match(word, title, body) for word in words]
        if all(matches):
            match = sum(matches) / len(matches) if matches else 1.0
            found.append((match, confidence(features, latent), latent))
    found.sort(key=lambda item: (-item[0], -item[1], item[2]))
    return [Hit(latent, features.label(latent), trust) for _, trust, latent in found[:n]]


def _word_match(word: str, title: str, body: str) -> float:
    """How well one word of a query fits: a whole word of the title, the start of one, anywhere in it, in the explanation."""
    starts = WORD.findall(title)
    if word in starts:
        return 1.0
    if any(start.startswith(word) for start in starts):
        return 0.8
    if word in title:
        return 0.5
    return 0.25 if any(start.startswith(word) for start in WORD.findall(body)) else 0.0


def confidence(features: Features, latent: int) -> float:
    """The explanation's score where it was measured, else what the explainer says of itself; 0 without either."""
    explanation = features.explanations.get(latent)
    if explanation is None:
        return 0.0
    return explanation.score if explanation.score is not None else explanation.certainty or 0.0


def firing_on(session: Session, text: Any, n: int = MAX_RESULTS) -> list[Hit]:
    """Features that fire on `text`, ranked by their mean over its tokens in units of their maximum; BOS is not counted."""
    features = session.needs_features()
    prompts = split_prompts(text)
    share: dict[int, float] = {}
    peak: dict[int, tuple[float, str]] = {}
    n_tokens = 0
    for prompt in prompts:
        row = new_row(session, prompt)
        reading = session.read(row.ids)
        pieces = session.tokenizer.pieces(row.ids[1:])
        n_tokens += len(pieces)
        for piece, values, indices in zip(pieces, reading.values[1:].tolist(), reading.indices[1:].tolist(), strict=True):
            for value, latent in zip(values, indices, strict=True):
                largest = float(features.max_values[latent])
                if value > 0 and largest > 0:
                    part = min(1.0, value / largest)
                    share[latent] = share.get(latent, 0.0) + part
                    peak[latent] = max(peak.get(latent, (0.0, "")), (part, piece))
    ranked = sorted(share, key=lambda latent: (-share[latent], latent))[:n]
    return [Hit(latent, features.label(latent), peak[latent][0], peak[latent][1]) for latent in ranked if n_tokens]


@torch.no_grad()
def neighbours(features: Features, latent: int, n: int = 8) -> list[Hit]:
    """The features that write in the most similar direction: cosine of decoder rows."""
    rows = features.sae.W_dec.float()
    cosine = torch.nn.functional.cosine_similarity(rows, rows[latent][None], dim=1)
    cosine[latent] = -torch.inf
    values, indices = cosine.topk(min(n, len(rows) - 1))
    return [Hit(int(i), features.label(int(i)), float(v)) for v, i in zip(values, indices, strict=True)]


def default_strength(features: Features, latent: int) -> float:
    """The strength that raised the feature most where that was measured; else one that is felt and leaves the text readable:
    the edit is as long as EDIT_SHARE of a typical activation.

    Normalised activations have a mean norm of about sqrt(d_model) under both `dataset` and `layer`, and decoder rows have unit
    norm, so the length of the edit is strength * maximum there.
    """
    if latent in features.best_strengths:
        return min(STRENGTHS[1], features.best_strengths[latent])
    largest = float(features.max_values[latent])
    if largest <= 0 or features.sae.cfg.norm == "none":
        return 1.0
    strength = EDIT_SHARE * math.sqrt(features.sae.cfg.d_model) / largest
    return min(STRENGTHS[1], max(STRENGTH_STEP, round(strength / STRENGTH_STEP) * STRENGTH_STEP))


def heat(session: Session, rows: Sequence[Row], latent: int) -> list[list[float]]:
    """For each row, the latent's value at each token after BOS, read on the unsteered model."""
    return [session.read(row.ids).of(latent)[1:] for row in rows]

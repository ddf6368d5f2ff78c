"""What happens on each click in the app: from what the client sent to what the page shows. No request leaves anything behind.

`Slots` holds the latent of each edit row of the page, None where the row is free; strengths, modes and positions stay in the
page's own controls and come with every request, three values a row, in the order of `Controls`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from inference import views
from inference.dialogue import Style, prepare
from inference.session import Features, Session
from inference.steering import Edit, Recipe
from inference.turns import Turns
from inference.workbench import (
    Knobs,
    Request,
    Snapshot,
    answer,
    checked_edit,
    checked_latent,
    checked_recipe,
    checked_request,
    compare,
    default_strength,
    firing_on,
    fitted,
    heat,
    new_row,
    search,
)
from llama3.chat_format import Message

N_SLOTS = 6
BY_LABEL, BY_TEXT = "Labels", "Fires on a text"

Slots = tuple[int | None, ...]
NO_SLOTS: Slots = (None,) * N_SLOTS


class Controls(NamedTuple):
    """One edit row as the page sends it, unchecked."""

    strength: Any = 1.0
    mode: Any = "add"
    positions: Any = "all"


class Shown(NamedTuple):
    """What an open feature changes on the page."""

    lens: int | None
    card: str
    columns: str
    legend: str


@dataclass(frozen=True)
class Handlers:
    """The app's answers, for one session shared by all clients."""

    session: Session
    style: Style
    turns: Turns = field(default_factory=Turns)

    @property
    def features(self) -> Features:
        return self.session.needs_features()

    # Finding and reading features

    def find(self, scope: Any, text: Any) -> str:
        """The list of features for a search in the labels, or by what fires on a text."""
        if self.session.features is None:
            return views.note("No SAE is loaded: start the app with --sae and --top.")
        try:
            if scope != BY_TEXT:
                hits = search(self.features, text)
            elif str(text).strip():
                hits = firing_on(self.session, text)
            else:
                return views.note("Write or paste a text: the features that fire on it appear here.")
        except ValueError as error:
            return views.note(str(error))
        return views.results(hits, self.features) if hits else views.note("Nothing found. Try another word, or a number.")

    def open(self, latent: Any, snapshot: Snapshot | None) -> Shown:
        """Show a feature's card and shade the texts by it. ValueError for a latent that does not exist."""
        index = checked_latent(self.features, latent)
        legend = views.legend(self.features, index) if snapshot is not None else ""
        return Shown(index, views.card(self.features, index), self.shaded(snapshot, index), legend)

    def shaded(self, snapshot: Snapshot | None, lens: int | None) -> str:
        """Both columns, each token shaded by the feature `lens`; plain while they are still being written."""
        if snapshot is None or snapshot.running or lens is None or self.session.features is None:
            return views.columns(self.session, snapshot, lens)
        heats = heat(self.session, [*snapshot.baseline, *(snapshot.steered or ())], lens)
        return views.columns(self.session, snapshot, lens, heats)

    # Edits

    def add(self, latent: Any, slots: Slots) -> tuple[Slots, int]:
        """Put a latent into the first free row; returns the rows and which it is. ValueError where no row is free."""
        index = checked_latent(self.features, latent)
        if index in slots:
            return slots, slots.index(index)
        if not float(self.features.max_values[index]) > 0:
            raise ValueError(f"feature {index} never fired on the corpus, so its maximum, the unit of steering, is unknown")
        if None not in slots:
            raise ValueError(f"all {N_SLOTS} edits are in use; remove one first")
        row = slots.index(None)
        return (*slots[:row], index, *slots[row + 1 :]), row

    def fresh(self, latent: int | None) -> Controls:
        """The controls of an edit that was just added."""
        assert latent is not None
        return Controls(default_strength(self.features, latent))

    def recipe(self, slots: Slots, controls: Sequence[Any]) -> Recipe:
        """The recipe that the page's edit rows describe; `controls` holds strength, mode and positions of each row in turn."""
        rows = [Controls(*controls[i : i + 3]) for i in range(0, len(controls), 3)]
        edits = [
            checked_edit(self.features, latent, row.strength, row.mode, row.positions)
            for latent, row in zip(slots, rows, strict=True)
            if latent is not None
        ]
        return Recipe(tuple(edits), self.features.sae.weights_hash) if edits else Recipe()

    def applied(self, text: Any) -> tuple[Slots, list[Controls]]:
        """The edit rows for a recipe given as text. ValueError says what is wrong with it."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError("there is no recipe; paste one, or open a file")
        recipe = checked_recipe(self.features, Recipe.from_json(text))
        if len(recipe.edits) > N_SLOTS:
            raise ValueError(f"this page holds {N_SLOTS} edits; the recipe has {len(recipe.edits)}")
        free = N_SLOTS - len(recipe.edits)
        slots = (*(edit.latent for edit in recipe.edits), *[None] * free)
        return slots, [_controls(edit) for edit in recipe.edits] + [Controls()] * free

    # Generation

    def generate(self, text: Any, knobs: Knobs, slots: Slots, controls: Sequence[Any]) -> Iterator[Snapshot]:
        """Snapshots of both columns while they are written. ValueError, before the model runs, where something is out of
        range."""
        recipe = self.recipe(slots, controls) if any(slot is not None for slot in slots) else Recipe()
        return compare(self.session, checked_request(self.session, text, recipe, knobs))

    def chat(
        self, messages: Sequence[tuple[str, str]], system: Any, knobs: Knobs, slots: Slots, controls: Sequence[Any]
    ) -> Iterator[tuple[str, int]]:
        """The answer to the last message as it grows, and how many old messages no longer fit into the context."""
        recipe = self.recipe(slots, controls) if any(slot is not None for slot in slots) else Recipe()
        opening = [Message("system", str(system).strip())] if isinstance(system, str) and system.strip() else []
        said = [Message("user" if role == "user" else "assistant", text) for role, text in messages]
        sampling = knobs.checked()
        turn = prepare(self.session, [*opening, *said], self.style, sampling.max_new_tokens)
        row = new_row(self.session, "", turn.ids)
        request = Request((row,), recipe, replace(fitted(self.session, sampling, [row]), stop=turn.stop))
        for row in answer(self.session, request):
            yield row.text.strip(), turn.dropped


def _controls(edit: Edit) -> Controls:
    return Controls(edit.strength, edit.mode, edit.positions if isinstance(edit.positions, str) else f"from {edit.positions}")

"""What happens on each click in the app: from what the client sent to what the page shows. No request leaves anything behind.

`Slots` holds the feature of each edit row of the page, None where the row is free; strengths, modes and positions stay in the
page's own controls and come with every request, three values a row, in the order of `Controls`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from inference.dialogue import Style, prepare
from inference.finding import Hit, hit
from inference.row import new_row
from inference.session import N_PRESETS, Feature, Session
from inference.steering import Edit, Recipe
from inference.web import views
from inference.web.finding import by_label, by_text
from inference.web.queue import Turns
from inference.web.validation import STRENGTHS, Knobs, checked_edit, checked_feature, checked_recipe
from inference.web.workbench import Request, Snapshot, answer, checked_request, compare, default_strength, heat
from llama3.chat_format import Message

N_SLOTS = 6
BY_LABEL, BY_TEXT = "Labels", "Fires on a text"

Slots = tuple[Feature | None, ...]
NO_SLOTS: Slots = (None,) * N_SLOTS


class Controls(NamedTuple):
    """One edit row as the page sends it, unchecked."""

    strength: Any = 1.0
    mode: Any = "add"
    positions: Any = "all"


class Shown(NamedTuple):
    """What an open feature changes on the page."""

    lens: Feature
    card: str
    columns: str
    legend: str


@dataclass(frozen=True)
class Handlers:
    """The app's answers, for one session shared by all clients."""

    session: Session
    style: Style
    start: tuple[Slots, Sequence[Controls]] = (NO_SLOTS, (Controls(),) * N_SLOTS)
    """The edits that a page begins with, as `applied` gives them."""
    turns: Turns = field(default_factory=Turns)

    @cached_property
    def starters(self) -> list[Hit]:
        """Features to begin with: the presets, where steering was measured, else those that are shown first."""
        known = [hit(of, latent, 0.0) for of in self.session.features for latent in of.presets]
        return (known or [one for of in self.session.features for one in by_label(of, "")])[:N_PRESETS]

    # Finding and reading features

    def find(self, site: Any, scope: Any, text: Any) -> str:
        """The list of features at `site` for a search in the labels, or by what fires on a text."""
        if not self.session.features:
            return views.note("No SAE is loaded: start the app with --sae and --top.")
        if scope == BY_TEXT and not str(text).strip():
            return views.note("Write or paste a text: the features that fire on it appear here.")
        try:
            hits = self._hits(site, scope, text)
        except ValueError as error:
            return views.status(str(error), "error")
        return views.results(self.session, hits, text) if hits else views.note("Nothing found. Try another word, or a number.")

    def first(self, site: Any, scope: Any, text: Any) -> Feature | None:
        """The first feature of that list, None where it is empty."""
        try:
            hits = self._hits(site, scope, text)
        except ValueError:
            return None
        return hits[0].feature if hits else None

    def _hits(self, site: Any, scope: Any, text: Any) -> list[Hit]:
        features = self.session.at(site)
        return by_text(self.session, features, text) if scope == BY_TEXT else by_label(features, text)

    def open(self, latent: Any, site: Any, snapshot: Snapshot | None) -> Shown:
        """Show a feature's card and shade the texts by it. ValueError for one that does not exist."""
        feature = checked_feature(self.session, latent, site)
        legend = views.legend(self.session, feature) if snapshot is not None else ""
        return Shown(feature, views.card(self.session, feature), self.shaded(snapshot, feature), legend)

    def shaded(self, snapshot: Snapshot | None, lens: Feature | None) -> str:
        """Both columns, each token shaded by the feature `lens`; plain while they are still being written."""
        if snapshot is None or snapshot.running or lens is None:
            return views.columns(self.session, snapshot, lens)
        heats = heat(self.session, [*snapshot.baseline, *(snapshot.steered or ())], lens)
        return views.columns(self.session, snapshot, lens, heats)

    # Edits

    def add(self, latent: Any, site: Any, slots: Slots) -> tuple[Slots, int]:
        """Put a feature into the first free row; returns the rows and which it is. ValueError where no row is free."""
        feature = checked_feature(self.session, latent, site)
        if feature in slots:
            return slots, slots.index(feature)
        if not float(self.session.at(feature.site).max_values[feature.latent]) > 0:
            raise ValueError(
                f"feature {feature.latent} never fired on the corpus, so its maximum, the unit of steering, is unknown"
            )
        if None not in slots:
            raise ValueError(f"all {N_SLOTS} edits are in use; remove one first")
        row = slots.index(None)
        return (*slots[:row], feature, *slots[row + 1 :]), row

    def fresh(self, feature: Feature | None) -> Controls:
        """The controls of an edit that was just added: at the strength measured as best where one was."""
        assert feature is not None
        features, latent = self.session.at(feature.site), feature.latent
        strength = features.best_strengths.get(latent) or default_strength(features, latent)
        return Controls(round(min(STRENGTHS[1], max(STRENGTHS[0], strength)), 2))

    def recipe(self, slots: Slots, controls: Sequence[Any]) -> Recipe:
        """The recipe that the page's edit rows describe; `controls` holds strength, mode and positions of each row in turn."""
        rows = [Controls(*controls[i : i + 3]) for i in range(0, len(controls), 3)]
        edits = [
            checked_edit(self.session.at(feature.site), feature.latent, *row)
            for feature, row in zip(slots, rows, strict=True)
            if feature is not None
        ]
        return Recipe.from_edits(edits)

    def applied(self, text: Any) -> tuple[Slots, list[Controls]]:
        """The edit rows for a recipe given as text. ValueError says what is wrong with it."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError("there is no recipe; paste one, or open a file")
        recipe = checked_recipe(self.session, Recipe.from_json(text))
        if len(recipe.edits) > N_SLOTS:
            raise ValueError(f"this page holds {N_SLOTS} edits; the recipe has {len(recipe.edits)}")
        free = N_SLOTS - len(recipe.edits)
        sites = {features.sae.weights_hash: features.site for features in self.session.features}
        slots = (*(Feature(sites[recipe.sae_of(edit)], edit.latent) for edit in recipe.edits), *[None] * free)
        return slots, [_controls(edit) for edit in recipe.edits] + [Controls()] * free

    # Generation

    def generate(self, text: Any, knobs: Knobs, slots: Slots, controls: Sequence[Any]) -> Iterator[Snapshot]:
        """Snapshots of both columns while they are written. ValueError, before the model runs, where something is out of
        range."""
        return compare(self.session, checked_request(self.session, text, self.recipe(slots, controls), knobs))

    def chat(
        self, messages: Sequence[tuple[str, str]], system: Any, knobs: Knobs, slots: Slots, controls: Sequence[Any]
    ) -> Iterator[tuple[str, int]]:
        """The answer to the last message as it grows, and how many old messages no longer fit into the context. ValueError as
        in `generate`."""
        recipe, sampling = self.recipe(slots, controls), knobs.checked()
        opening = [Message("system", str(system).strip())] if isinstance(system, str) and system.strip() else []
        said = [Message("user" if role == "user" else "assistant", text) for role, text in messages]
        turn = prepare(self.session, [*opening, *said], self.style, sampling.max_new_tokens)
        row = new_row(self.session, "", turn.ids)
        request = Request((row,), recipe, turn.ended(sampling))
        return ((row.text.strip(), turn.dropped) for row in answer(self.session, request))


def _controls(edit: Edit) -> Controls:
    return Controls(edit.strength, edit.mode, edit.positions if isinstance(edit.positions, str) else f"from {edit.positions}")

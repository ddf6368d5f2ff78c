"""The panels that say how the model is steered and sampled: rows of edits, the sampling knobs, the recipe as text."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from inference import views
from inference.handlers import N_SLOTS, NO_SLOTS, Controls, Handlers, Slots
from inference.limits import MAX_NEW_TOKENS, STRENGTHS, Knobs
from inference.panels.events import QUICK, folded, mark, script, sent, skips
from inference.session import Feature
from inference.steering import MAX_RECIPE_CHARACTERS, MODES, PLACES


class Edits:
    """One row an edit. `slots` holds the features; strengths, modes and positions stay in the rows' own `controls`."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        slots, values = handlers.start
        self.slots = gr.State(slots)
        self.hint = gr.HTML(self._hint(slots), elem_id="hint", js_on_load=script("clicks"), apply_default_css=False)
        self.rows: list[gr.Row] = []
        self.titles: list[gr.HTML] = []
        self.controls: list[Any] = []
        self.removers: list[gr.Button] = []
        for i in range(N_SLOTS):
            self._build_row(i, slots[i], values[i])
        self.status = gr.HTML("", elem_id="edit-status", apply_default_css=False)
        self.knobs = _build_knobs()
        self.changed = [self.slots, self.hint, *self.rows, *self.titles, *self.controls]
        """What `updates` updates."""
        for i, button in enumerate(self.removers):
            button.click(
                lambda slots, i=i: self.updates((*slots[:i], None, *slots[i + 1 :])), [self.slots], self.changed, **QUICK
            )

    def _build_row(self, i: int, feature: Feature | None, values: Controls) -> None:
        with gr.Row(visible=feature is not None, elem_classes="edit", elem_id=f"edit-{i}", equal_height=False) as row:
            title = self._title(feature)
            self.titles.append(gr.HTML(title, elem_classes="edit-title", js_on_load=script("clicks"), apply_default_css=False))
            strength = gr.Slider(
                *STRENGTHS,
                value=values.strength,
                step=0.05,
                label="Strength × maximum",
                elem_classes="strength",
                min_width=220,
                buttons=[],
            )
            mode = gr.Dropdown(list(MODES), value=values.mode, label="Mode", elem_classes="mode", min_width=110)
            where = gr.Dropdown(
                [*PLACES, "from 10"],
                value=values.positions,
                label="Tokens",
                allow_custom_value=True,
                elem_classes="mode",
                min_width=110,
            )
            self.removers.append(gr.Button("Remove", elem_classes="remove", min_width=40, size="sm"))
        self.rows.append(row)
        self.controls += [strength, mode, where]

    def wire_add(self, sources: Sequence[gr.HTML]) -> None:
        """Steer with a feature from any of `sources`."""
        for source in (self.hint, *sources):
            adding = source.steer(self._add, [self.slots, *self.controls], [*self.changed, self.status], **QUICK)
            adding.then(None, None, None, js=mark("steer", loading=False))

    def _add(self, event: gr.EventData, slots: Slots, *controls: Any) -> Sequence[Any]:
        try:
            new, row = self._handlers.add(sent(event, "latent"), sent(event, "site"), slots)
        except ValueError as error:
            return (*skips(len(self.changed)), views.status(str(error), "error"))
        values = [Controls(*controls[i : i + 3]) for i in range(0, len(controls), 3)]
        if new != slots:
            values[row] = self._handlers.fresh(new[row])
        return (*self.updates(new, values), "")

    def updates(self, slots: Slots, values: Sequence[Controls] | None = None) -> list[Any]:
        """Updates of `changed`; `values` None leaves the controls as they are."""
        titles = [self._title(feature) for feature in slots]
        controls = [gr.skip()] * len(self.controls) if values is None else [value for row in values for value in row]
        rows = [gr.update(visible=feature is not None) for feature in slots]
        return [slots, self._hint(slots), *rows, *titles, *controls]

    def _title(self, feature: Feature | None) -> str:
        return "" if feature is None else views.edit_title(self._handlers.session, feature)

    def _hint(self, slots: Slots) -> str:
        session, text, starters = self._handlers.session, "", []
        if not session.features:
            text = "No SAE is loaded, so nothing can be steered: start with --sae and --top."
        elif slots == NO_SLOTS:
            text, starters = "Press + beside a feature to steer with it, or start with one of these.", self._handlers.starters
        return views.edits_hint(session, text, starters)


def _build_knobs() -> list[Any]:
    """The sampling controls, in the order of `Knobs`."""
    start = Knobs()
    with folded("Sampling", "sampling"):
        with gr.Row():
            numbers = [
                _slider(1, MAX_NEW_TOKENS, start.max_new_tokens, 1, "New tokens"),
                _slider(0, 2, start.temperature, 0.05, "Temperature"),
                _slider(0.05, 1, start.top_p, 0.01, "Top-p"),
                _slider(0, 200, start.top_k, 1, "Top-k (0: all)"),
                _slider(0, 1, start.min_p, 0.01, "Min-p (0: off)"),
                _slider(1, 2, start.repetition_penalty, 0.05, "Repetition"),
            ]
        with gr.Row():
            seed = gr.Number(start.seed, label="Seed", precision=0, minimum=0, min_width=110, elem_id="seed")
            stop = gr.Textbox(
                start.stop, label="Stop strings, one a line (\\n is a line break)", lines=1, max_lines=4, min_width=220,
                elem_id="stops",
            )  # fmt: skip
    return [*numbers, seed, stop]


def _slider(low: float, high: float, value: float, step: float, label: str) -> gr.Slider:
    name = label.split(" (")[0].lower().replace(" ", "-")
    return gr.Slider(low, high, value, step=step, label=label, min_width=150, elem_id=name, buttons=[])


class RecipePanel:
    """The edits as text: to copy, download, paste and open."""

    def __init__(self, handlers: Handlers, edits: Edits) -> None:
        self._handlers = handlers
        self._edits = edits
        slots, values = handlers.start
        self.text = gr.Textbox(
            self._written(slots, *(value for row in values for value in row))[0],
            label="The edits as text; every command takes it with --steer recipe.json",
            placeholder="No edits yet. Add one, or paste a recipe here and apply it.",
            lines=12, max_lines=24, elem_id="recipe", buttons=["copy"], max_length=MAX_RECIPE_CHARACTERS,
        )  # fmt: skip
        with gr.Row(elem_classes="actions"):
            self.apply = gr.Button("Apply", variant="primary", min_width=100, scale=0, elem_id="apply")
            self.download = gr.Button("Download", min_width=100, scale=0, elem_id="download")
            self.upload = gr.Button("Open file", min_width=100, scale=0, elem_id="open-file")
            self.status = gr.HTML("", elem_id="recipe-status", apply_default_css=False)
        triggers = [edits.slots.change, *(control.change for control in edits.controls)]
        gr.on(triggers, self._written, [edits.slots, *edits.controls], [self.text, edits.status], **QUICK)
        self.apply.click(None, None, None, js=mark("steer", loading=True))
        applying = self.apply.click(self._apply, [self.text], [*edits.changed, self.status], **QUICK)
        applying.then(None, None, None, js=mark("steer", loading=False))
        self.download.click(None, [self.text], None, js=script("download"))
        self.upload.click(None, None, [self.text], js=script("open_file"))

    def _written(self, slots: Slots, *controls: Any) -> tuple[Any, str]:
        try:
            recipe = self._handlers.recipe(slots, controls)
        except ValueError as error:
            return gr.skip(), views.status(str(error), "error")
        return recipe.to_json() if recipe.edits else "", ""

    def _apply(self, text: str) -> Sequence[Any]:
        try:
            slots, values = self._handlers.applied(text)
        except ValueError as error:
            return (*skips(len(self._edits.changed)), views.status(str(error), "error"))
        n = len(slots) - slots.count(None)
        return (*self._edits.updates(slots, values), views.status(f"{n} edit{'s' if n != 1 else ''} applied"))

"""The panel that finds features and shows the card of the one that is open."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from inference import views
from inference.handlers import BY_LABEL, BY_TEXT, Handlers
from inference.limits import MAX_PROMPT_CHARACTERS
from inference.panels.events import QUICK, script
from inference.workbench import Snapshot


class Finder:
    """Search box, list of features, card."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        with gr.Column(elem_classes=["sheet", "search"]):
            self.query = gr.Textbox(
                label="Find features",
                placeholder="weather, grief, 896 …",
                elem_id="query",
                max_lines=6,
                max_length=MAX_PROMPT_CHARACTERS,
            )
            self.scope = gr.Radio([BY_LABEL, BY_TEXT], value=BY_LABEL, show_label=False, elem_id="scope", container=False)
            self.results = gr.HTML(
                handlers.find(BY_LABEL, ""),
                elem_id="results",
                js_on_load=script("clicks") + script("results"),
                apply_default_css=False,
            )
        with gr.Column(elem_classes=["sheet", "reading"]):
            self.card = gr.HTML(
                views.no_card(), elem_id="card", js_on_load=script("clicks") + script("card"), apply_default_css=False
            )
        gr.on(
            [self.query.change, self.scope.change], handlers.find, [self.scope, self.query], [self.results],
            **QUICK, trigger_mode="always_last",
        )  # fmt: skip

    def wire_open(
        self, blocks: gr.Blocks, titles: Sequence[gr.HTML], snapshot: gr.State, lens: gr.State, others: Sequence[gr.HTML]
    ) -> None:
        """Open a feature from the list, a card's neighbours, `titles`, the search box or the page's address.

        `others` are the texts that are shaded by it, their legend, and a line for what went wrong.
        """
        shown = [lens, self.card, *others]
        for source in (self.results, self.card, *titles):
            source.open(self._open, [snapshot], shown, **QUICK)
        self.query.submit(self._open_first, [self.scope, self.query, snapshot], shown, **QUICK)
        blocks.load(self._open_from_address, [snapshot], shown, **QUICK)

    def _open(self, event: gr.EventData, snapshot: Snapshot | None) -> Sequence[Any]:
        return self._shown(event.latent, snapshot)

    def _open_first(self, scope: str, query: str, snapshot: Snapshot | None) -> Sequence[Any]:
        latent = self._handlers.first(scope, query)
        return self._shown(latent, snapshot) if latent is not None else [gr.skip()] * 5

    def _open_from_address(self, request: gr.Request, snapshot: Snapshot | None) -> Sequence[Any]:
        latent = dict(request.query_params).get("latent")
        if latent is None or self._handlers.session.features is None:
            return [gr.skip()] * 5
        return self._shown(latent, snapshot)

    def _shown(self, latent: Any, snapshot: Snapshot | None) -> Sequence[Any]:
        try:
            return (*self._handlers.open(latent, snapshot), "")
        except ValueError as error:
            return (gr.skip(), views.no_card(str(error)), gr.skip(), gr.skip(), gr.skip())

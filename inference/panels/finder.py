"""The panel that finds features, at one of the sites that have an SAE, and shows the card of the one that is open."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from inference import views
from inference.handlers import BY_LABEL, BY_TEXT, Handlers
from inference.limits import MAX_PROMPT_CHARACTERS
from inference.panels.events import QUICK, mark, script, sent, skips
from inference.session import Feature
from inference.workbench import Snapshot


class Finder:
    """Search box, list of features, card; a choice of site where there are several."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        sites = [features.site for features in handlers.session.features]
        with gr.Column(elem_classes=["sheet", "search"]):
            self.site = gr.Dropdown(
                sites, value=sites[0] if sites else None, label="Site", visible=len(sites) > 1, elem_id="site", filterable=False
            )
            self.query = gr.Textbox(
                label="Find features",
                placeholder="weather, grief, 896 …",
                elem_id="query",
                max_lines=6,
                max_length=MAX_PROMPT_CHARACTERS,
            )
            self.scope = gr.Radio([BY_LABEL, BY_TEXT], value=BY_LABEL, show_label=False, elem_id="scope", container=False)
            self.results = gr.HTML(
                handlers.find("", BY_LABEL, ""),
                elem_id="results",
                js_on_load=script("clicks") + script("opened") + script("results"),
                apply_default_css=False,
            )
        with gr.Column(elem_classes=["sheet", "reading"]):
            self.card = gr.HTML(
                views.no_card(),
                elem_id="card",
                js_on_load=script("clicks") + script("opened") + script("card"),
                apply_default_css=False,
            )
        self._search = [self.site, self.scope, self.query]
        changes = [self.site.change, self.scope.change, self.query.change]
        gr.on(changes, None, None, None, js=mark("results", loading=True))
        search = gr.on(changes, handlers.find, self._search, [self.results], **QUICK, trigger_mode="always_last")
        search.then(None, None, None, js=mark("results", loading=False))

    def wire_open(
        self, blocks: gr.Blocks, titles: Sequence[gr.HTML], snapshot: gr.State, lens: gr.State, others: Sequence[gr.HTML]
    ) -> None:
        """Open a feature from the list, a card's neighbours, `titles`, the search box or the page's address.

        `others` are the texts that are shaded by it, their legend, and a line for what went wrong.
        """
        shown = [lens, self.card, *others]
        for source in (self.results, self.card, *titles):
            source.open(self._open, [snapshot], shown, **QUICK)
        self.query.submit(self._open_first, [*self._search, snapshot], shown, **QUICK)
        opening = blocks.load(self._open_from_address, [snapshot], [self.site, *shown], **QUICK)
        opening.then(None, None, None, js=mark("card", loading=False))

    def _open(self, event: gr.EventData, snapshot: Snapshot | None) -> Sequence[Any]:
        return self._shown(sent(event, "latent"), sent(event, "site"), snapshot)

    def _open_first(self, site: str, scope: str, query: str, snapshot: Snapshot | None) -> Sequence[Any]:
        found = self._handlers.first(site, scope, query)
        return skips(5) if found is None else self._shown(found.latent, found.site, snapshot)

    def _open_from_address(self, request: gr.Request, snapshot: Snapshot | None) -> Sequence[Any]:
        """The list is that of the feature's site, too."""
        asked = dict(request.query_params)
        if "latent" not in asked or not self._handlers.session.features:
            return skips(6)
        lens, *others = self._shown(asked["latent"], asked.get("site", ""), snapshot)
        return (lens.site if isinstance(lens, Feature) else gr.skip(), lens, *others)

    def _shown(self, latent: Any, site: Any, snapshot: Snapshot | None) -> Sequence[Any]:
        try:
            return (*self._handlers.open(latent, site, snapshot), "")
        except ValueError as error:
            return (gr.skip(), views.no_card(str(error)), *skips(3))

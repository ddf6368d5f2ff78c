"""The app's page: where its panels stand, and what one of them changes in another."""

import gradio as gr

from inference.web import views
from inference.web.handlers import Handlers
from inference.web.panels.chat import Chat
from inference.web.panels.compare import Compare
from inference.web.panels.edits import Edits, RecipePanel
from inference.web.panels.events import client, script
from inference.web.panels.finder import Finder

PANELS = ("Compare", "Chat", "Recipe")


class Page:
    """`blocks` is the page as Gradio serves it."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        with gr.Blocks(title="Feature workbench", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.HTML(views.masthead(handlers.session), js_on_load=script("masthead"), apply_default_css=False)
            with gr.Row(elem_classes="bench", equal_height=False):
                with gr.Column(elem_classes="finder", elem_id="find", scale=4, min_width=320):
                    finder = Finder(handlers)
                with gr.Column(elem_classes="work", scale=7, min_width=320):
                    with gr.Column(elem_classes="sheet", elem_id="steer"):
                        edits = Edits(handlers)
                    with gr.Column(elem_classes="sheet", elem_id="read"):
                        gr.HTML(views.tabs(PANELS), js_on_load=script("tabs"), apply_default_css=False)
                        with gr.Column(elem_id="panel-compare"):
                            compare = Compare(handlers, edits)
                        with gr.Column(elem_id="panel-chat"):
                            Chat(handlers, edits)
                        with gr.Column(elem_id="panel-recipe"):
                            RecipePanel(handlers, edits)
            shaded = [compare.columns, compare.legend, edits.status]
            finder.wire_open(self.blocks, edits.titles, compare.snapshot, compare.lens, shaded)
            edits.wire_add([finder.results, finder.card])
            self.blocks.unload(self._leave)

    def _leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self._handlers.turns.stop(client(request))

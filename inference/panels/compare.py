"""The panel that continues prompts, as the model is and steered, side by side."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from inference import views
from inference.handlers import Handlers, Slots
from inference.limits import MAX_PROMPT_CHARACTERS, Knobs
from inference.panels.edits import Edits
from inference.panels.events import AT_ONCE, GENERATION, QUICK, buttons, client, script, sent, skips, waiting, while_going
from inference.session import Feature
from inference.workbench import Snapshot

KIND = "compare"
EXAMPLES = (
    "This morning I",
    "She opened the letter and",
    "The storm reached the harbour at night, and",
    "To make the soup, first",
    "In the second half of the match",
)


class Compare:
    """Prompts, and both columns of text. `lens` is the feature by which they are shaded."""

    def __init__(self, handlers: Handlers, edits: Edits) -> None:
        self._handlers = handlers
        self.lens, self.snapshot = gr.State(None), gr.State(None)
        self.prompts = gr.Textbox(
            EXAMPLES[0], label="Prompts, one a line", lines=2, max_lines=8, elem_id="prompts", max_length=MAX_PROMPT_CHARACTERS
        )
        self.examples = gr.HTML(views.examples(EXAMPLES), js_on_load=script("examples"), apply_default_css=False)
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=140, scale=0)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=90, scale=0, interactive=False)
            self.status = gr.HTML("", elem_id="status", apply_default_css=False)
        self.columns = gr.HTML(views.columns(handlers.session, None, None), elem_id="columns", apply_default_css=False)
        self.legend = gr.HTML("", elem_id="legend", apply_default_css=False)
        self._wire(edits)

    def _wire(self, edits: Edits) -> None:
        self.examples.choose(self._choose, None, [self.prompts], **QUICK)
        presses = [self.go.click, self.prompts.submit]
        gr.on(presses, None, None, [self.go, self.status], js=script("generate_pressed"), api_visibility="private")
        generation = gr.on(
            presses,
            self._generate,
            [self.prompts, edits.slots, *edits.knobs, *edits.controls],
            [self.columns, self.legend, self.status, self.snapshot, self.go, self.stop],
            **GENERATION,
        )
        finished = [self.columns, self.legend, self.status, self.snapshot, self.go, self.stop]
        generation.then(self._finish, [self.snapshot, self.lens, edits.slots], finished, **QUICK)
        self.stop.click(self._stop, None, None, **AT_ONCE)

    def _choose(self, event: gr.EventData) -> Any:
        prompt = sent(event, "prompt")
        return prompt[:MAX_PROMPT_CHARACTERS] if isinstance(prompt, str) else gr.skip()

    def _generate(self, request: gr.Request, prompts: str, slots: Slots, *values: Any) -> Iterator[Sequence[Any]]:
        """Every answer says what the buttons are: of two that reach the page together Gradio shows the later one alone."""
        n = len(Knobs._fields)
        snapshot = None
        try:
            with self._handlers.turns.take(client(request), KIND) as turn:
                stream = self._handlers.generate(prompts, Knobs(*values[:n]), slots, values[n:])
                yield (gr.skip(), "", waiting(turn), None, *buttons(running=True))
                for snapshot in while_going(turn, stream):
                    columns = views.columns(self._handlers.session, snapshot, None)
                    yield (columns, gr.skip(), views.progress(snapshot), snapshot, *buttons(running=True))
                if turn.stopped:
                    ended = snapshot and snapshot.ended()
                    said = views.progress(ended) if ended else views.status("Stopped.")
                    yield (*skips(2), said, ended, *buttons(running=True))
        except ValueError as error:
            yield (*skips(2), views.status(str(error), "error"), None, *buttons(running=False))

    def _finish(self, snapshot: Snapshot | None, lens: Feature | None, slots: Slots) -> Sequence[Any]:
        """The end of a generation, or its stop: shade the texts by the open feature, else by the first that was steered."""
        if snapshot is None:
            return (*skips(4), *buttons(running=False))
        if lens is None:
            lens = next((feature for feature in slots if feature is not None), None)
        ended = snapshot.ended()
        legend = views.legend(self._handlers.session, lens) if lens is not None else ""
        columns = self._handlers.shaded(ended, lens)
        return (columns, legend, views.progress(ended), ended, *buttons(running=False))

    def _stop(self, request: gr.Request) -> None:
        self._handlers.turns.stop(client(request), KIND)

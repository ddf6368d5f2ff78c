"""The app's page: components, and which click calls which of `Handlers`; what is said there is written by `views`."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import gradio as gr

from inference import views
from inference.handlers import BY_LABEL, BY_TEXT, N_SLOTS, NO_SLOTS, Controls, Handlers, Slots
from inference.steering import MODES, PLACES
from inference.turns import RUNNING, WAITING, Turn
from inference.workbench import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS, STRENGTH_STEP, STRENGTHS, Knobs, Snapshot

QUEUE_SIZE = 64
"""Small requests that may wait in Gradio's queue; generations wait in `Turns`, where they can be stopped."""
QUICK_AT_ONCE = 8
MAX_THREADS = RUNNING + WAITING + 2 * QUICK_AT_ONCE
"""A generation that waits for its turn holds a thread of the server, and must not keep small requests from theirs."""
N_KNOBS = 5
QUICK: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": QUICK_AT_ONCE,
    "concurrency_id": "quick",
    "api_visibility": "private",
}
AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
GENERATION: dict[str, Any] = {
    "show_progress": "hidden", "concurrency_limit": None, "concurrency_id": "generate", "api_visibility": "private",
}  # fmt: skip
T = TypeVar("T")
COMPARE, CHAT = "compare", "chat"
RESET = "reset"
EXAMPLES = (
    "The storm reached the harbour at night, and",
    "She opened the letter and",
    "To make the soup, first",
    "The president told the people that",
    "In the second half of the match",
)

# A click on anything that carries data-open or data-steer reaches the server as an event; the address follows the open feature.
ON_CLICK = """
element.addEventListener('click', (event) => {
  const opened = event.target.closest('[data-open]'), steered = event.target.closest('[data-steer]');
  if (steered) trigger('steer', {latent: Number(steered.dataset.steer)});
  else if (opened) {
    const address = new URL(window.location);
    address.searchParams.set('latent', opened.dataset.open);
    history.replaceState(null, '', address);
    trigger('open', {latent: Number(opened.dataset.open)});
  }
});
"""
# A card that was opened is read from its top; on a narrow page it also comes into view.
ON_CARD = f"""{ON_CLICK}
watch('value', () => {{
  element.closest('.reading').scrollTop = 0;
  if (window.innerWidth <= 900) element.closest('.reading').scrollIntoView({{block: 'start'}});
}});
"""
ON_EXAMPLE = """
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('[data-prompt]');
  if (chosen) trigger('choose', {prompt: chosen.dataset.prompt});
});
"""
ON_MASTHEAD = """
const kept = localStorage.getItem('workbench-theme');
if (kept) document.body.classList.toggle('dark', kept === 'dark');
element.addEventListener('click', (event) => {
  if (!event.target.closest('.theme')) return;
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('workbench-theme', dark ? 'dark' : 'light');
});
"""
DOWNLOAD = """
(text) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  link.download = 'recipe.json';
  link.click();
  URL.revokeObjectURL(link.href);
}
"""
OPEN_FILE = """
() => new Promise((resolve) => {
  const input = document.createElement('input');
  input.type = 'file';
  input.accept = '.json,application/json';
  input.onchange = async () => {
    const file = input.files[0];
    resolve(file.size > 65536 ? 'the file is larger than 64 KB' : await file.text());
  };
  input.click();
})
"""


class Page:
    """The components of one page, and their wiring."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers
        self.steerable = handlers.session.features is not None
        with gr.Blocks(title="Feature workbench", analytics_enabled=False, fill_width=True) as self.blocks:
            self.lens = gr.State(None)
            self.slots = gr.State(NO_SLOTS)
            self.snapshot = gr.State(None)
            self.messages = gr.State(())
            gr.HTML(views.masthead(handlers.session), js_on_load=ON_MASTHEAD, apply_default_css=False)
            with gr.Row(elem_classes="bench", equal_height=False):
                with gr.Column(elem_classes="finder", elem_id="find", scale=4, min_width=320):
                    self._build_finder()
                with gr.Column(elem_classes="work", scale=7, min_width=320):
                    with gr.Column(elem_classes="sheet", elem_id="steer"):
                        self._build_edits()
                    with gr.Column(elem_classes="sheet", elem_id="read"), gr.Tabs():
                        with gr.Tab("Compare"):
                            self._build_compare()
                        with gr.Tab("Chat"):
                            self._build_chat()
                        with gr.Tab("Recipe"):
                            self._build_recipe()
            self._wire_features()
            self._wire_edits()
            self._wire_compare()
            self._wire_chat()
            self.blocks.unload(self._leave)

    # Components

    def _build_finder(self) -> None:
        with gr.Column(elem_classes="sheet"):
            self.query = gr.Textbox(
                label="Find features",
                placeholder="weather, grief, 896 …",
                elem_id="query",
                max_lines=6,
                max_length=MAX_PROMPT_CHARACTERS,
            )
            self.scope = gr.Radio([BY_LABEL, BY_TEXT], value=BY_LABEL, show_label=False, elem_id="scope", container=False)
            found = self.handlers.find(BY_LABEL, "")
            self.results = gr.HTML(found, elem_id="results", js_on_load=ON_CLICK, apply_default_css=False)
        with gr.Column(elem_classes=["sheet", "reading"]):
            self.card = gr.HTML(
                views.note("Open a feature to see what it responds to."),
                elem_id="card",
                js_on_load=ON_CARD,
                apply_default_css=False,
            )

    def _build_edits(self) -> None:
        hint = (
            "Press + beside a feature to steer with it." if self.steerable else "No SAE is loaded, so nothing can be steered."
        )
        self.hint = gr.HTML(f'<h2 class="section">Edits</h2>{views.note(hint)}', elem_id="hint", apply_default_css=False)
        self.rows: list[gr.Row] = []
        self.titles: list[gr.HTML] = []
        self.controls: list[Any] = []
        self.removers: list[gr.Button] = []
        for i in range(N_SLOTS):
            with gr.Row(visible=False, elem_classes="edit", elem_id=f"edit-{i}", equal_height=False) as row:
                self.titles.append(gr.HTML("", elem_classes="edit-title", js_on_load=ON_CLICK, apply_default_css=False))
                strength = gr.Slider(
                    *STRENGTHS,
                    value=1.0,
                    step=STRENGTH_STEP,
                    label="Strength × maximum",
                    elem_classes="strength",
                    min_width=220,
                )
                mode = gr.Dropdown(list(MODES), value="add", label="Mode", elem_classes="mode", min_width=110)
                where = gr.Dropdown(
                    [*PLACES, "from 10"],
                    value="all",
                    label="Tokens",
                    allow_custom_value=True,
                    elem_classes="mode",
                    min_width=110,
                )
                self.removers.append(gr.Button("×", elem_classes="remove", min_width=40, size="sm"))
            self.rows.append(row)
            self.controls += [strength, mode, where]
        self.edit_status = gr.HTML("", apply_default_css=False)

    def _build_compare(self) -> None:
        self.prompts = gr.Textbox(
            EXAMPLES[0], label="Prompts, one a line", lines=2, max_lines=8, elem_id="prompts", max_length=MAX_PROMPT_CHARACTERS
        )
        self.examples = gr.HTML(views.examples(EXAMPLES), js_on_load=ON_EXAMPLE, apply_default_css=False)
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=140, scale=0)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=90, scale=0, interactive=False)
            self.status = gr.HTML("", elem_id="status", apply_default_css=False)
        defaults = Knobs()
        with gr.Accordion("Sampling", open=False, elem_classes="sampling"), gr.Row():
            self.knobs = [
                gr.Slider(
                    1, MAX_NEW_TOKENS, defaults.max_new_tokens, step=1, label="New tokens", min_width=150, elem_id="new-tokens"
                ),
                gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature", min_width=150),
                gr.Slider(0.05, 1, defaults.top_p, step=0.01, label="Top-p", min_width=150),
                gr.Slider(1, 2, defaults.repetition_penalty, step=0.05, label="Repetition penalty", min_width=150),
                gr.Number(defaults.seed, label="Seed", precision=0, minimum=0, min_width=110),
            ]
        self.columns = gr.HTML(views.columns(self.handlers.session, None, None), elem_id="columns", apply_default_css=False)
        self.legend = gr.HTML("", elem_id="legend", apply_default_css=False)

    def _build_chat(self) -> None:
        self.transcript = gr.HTML(
            views.transcript(()), elem_id="transcript", apply_default_css=False, autoscroll=True, max_height=520
        )
        with gr.Row(elem_classes="actions"):
            self.message = gr.Textbox(
                show_label=False,
                placeholder="Your message",
                elem_id="message",
                scale=1,
                container=False,
                max_length=MAX_PROMPT_CHARACTERS,
            )
            self.send = gr.Button("Send", variant="primary", min_width=90, scale=0, elem_id="send")
            self.chat_stop = gr.Button("Stop", min_width=80, scale=0, interactive=False, elem_id="chat-stop")
            self.reset = gr.Button("New chat", min_width=100, scale=0, elem_id="new-chat")
        self.chat_status = gr.HTML("", elem_id="chat-status", apply_default_css=False)
        with gr.Accordion("System prompt", open=False):
            self.system = gr.Textbox(show_label=False, lines=2, container=False, max_length=MAX_PROMPT_CHARACTERS)
        if self.handlers.style == "plain":
            text = "This model has learnt to continue text, not to converse: expect it to ramble. Steering works all the same."
            gr.HTML(views.note(text), apply_default_css=False)

    def _build_recipe(self) -> None:
        self.recipe = gr.Textbox(
            label="The edits as text; every command takes it with --steer recipe.json", lines=12, max_lines=24,
            elem_id="recipe", buttons=["copy"], max_length=64_000,
        )  # fmt: skip
        with gr.Row(elem_classes="actions"):
            self.apply = gr.Button("Apply", variant="primary", min_width=100, scale=0, elem_id="apply")
            self.download = gr.Button("Download", min_width=100, scale=0)
            self.upload = gr.Button("Open file", min_width=100, scale=0)
            self.recipe_status = gr.HTML("", elem_id="recipe-status", apply_default_css=False)

    # Wiring

    def _wire_features(self) -> None:
        find = {"fn": self.handlers.find, "inputs": [self.scope, self.query], "outputs": [self.results]}
        gr.on([self.query.change, self.scope.change], **find, **QUICK, trigger_mode="always_last")
        shown = [self.lens, self.card, self.columns, self.legend, self.edit_status]
        for source in (self.results, self.card, *self.titles):
            source.open(self._open, [self.snapshot], shown, **QUICK)
        self.blocks.load(self._open_from_address, [self.snapshot], shown, **QUICK)

    def _wire_edits(self) -> None:
        changed = [self.slots, self.hint, *self.rows, *self.titles, *self.controls]
        for source in (self.results, self.card):
            source.steer(self._add, [self.slots, *self.controls], [*changed, self.edit_status], **QUICK)
        for i, button in enumerate(self.removers):
            button.click(
                lambda slots, i=i: self._edit_rows((*slots[:i], None, *slots[i + 1 :])), [self.slots], changed, **QUICK
            )
        triggers = [self.slots.change, *(control.change for control in self.controls)]
        gr.on(triggers, self._recipe_text, [self.slots, *self.controls], [self.recipe, self.edit_status], **QUICK)
        self.apply.click(self._apply, [self.recipe], [*changed, self.recipe_status], **QUICK)
        self.download.click(None, [self.recipe], None, js=DOWNLOAD)
        self.upload.click(None, None, [self.recipe], js=OPEN_FILE)

    def _wire_compare(self) -> None:
        self.examples.choose(self._choose, None, [self.prompts], **QUICK)
        generation = gr.on(
            [self.go.click, self.prompts.submit],
            self._generate,
            [self.prompts, self.slots, *self.knobs, *self.controls],
            [self.columns, self.status, self.snapshot, self.go, self.stop],
            **GENERATION,
        )
        finished = [self.columns, self.legend, self.status, self.snapshot, self.go, self.stop]
        generation.then(self._finish, [self.snapshot, self.lens, self.slots], [*finished, self.lens], **QUICK)
        self.stop.click(self._stop, None, None, **AT_ONCE)

    def _wire_chat(self) -> None:
        answering = gr.on(
            [self.send.click, self.message.submit],
            self._chat,
            [self.message, self.messages, self.system, self.slots, *self.knobs, *self.controls],
            [self.transcript, self.messages, self.message, self.chat_status, self.send, self.chat_stop],
            **GENERATION,
        )
        ready = [self.send, self.chat_stop]
        answering.then(lambda: _buttons(running=False), None, ready, **QUICK)
        self.chat_stop.click(self._stop_chat, None, None, **AT_ONCE)
        self.reset.click(self._reset_chat, None, [self.transcript, self.messages, self.chat_status], **QUICK)

    # Answers: `Handlers`, as updates of components

    def _open(self, event: gr.EventData, snapshot: Snapshot | None) -> Sequence[Any]:
        try:
            return (*self.handlers.open(event.latent, snapshot), "")
        except ValueError as error:
            return (gr.skip(), gr.skip(), gr.skip(), gr.skip(), views.status(str(error), "error"))

    def _open_from_address(self, request: gr.Request, snapshot: Snapshot | None) -> Sequence[Any]:
        latent = dict(request.query_params).get("latent")
        if latent is None or not self.steerable:
            return (gr.skip(),) * 5
        try:
            return (*self.handlers.open(latent, snapshot), "")
        except ValueError as error:
            return (gr.skip(), views.note(str(error)), gr.skip(), gr.skip(), gr.skip())

    def _add(self, event: gr.EventData, slots: Slots, *controls: Any) -> Sequence[Any]:
        try:
            new, row = self.handlers.add(event.latent, slots)
        except ValueError as error:
            return (*(gr.skip() for _ in range(2 + 2 * N_SLOTS + len(controls))), views.status(str(error), "error"))
        values = [Controls(*controls[i : i + 3]) for i in range(0, len(controls), 3)]
        if new != slots:
            values[row] = self.handlers.fresh(new[row])
        return (*self._edit_rows(new, values), "")

    def _edit_rows(self, slots: Slots, values: Sequence[Controls] | None = None) -> list[Any]:
        """Updates of the slots, the hint, and every row, title and control."""
        features = self.handlers.features
        titles = ["" if latent is None else views.edit_title(features, latent) for latent in slots]
        used = any(latent is not None for latent in slots)
        hint = "" if used else views.note("Press + beside a feature to steer with it.")
        controls = [gr.skip()] * len(self.controls) if values is None else [value for row in values for value in row]
        rows = [gr.update(visible=latent is not None) for latent in slots]
        return [slots, f'<h2 class="section">Edits</h2>{hint}', *rows, *titles, *controls]

    def _recipe_text(self, slots: Slots, *controls: Any) -> tuple[str, str]:
        try:
            recipe = self.handlers.recipe(slots, controls)
        except ValueError as error:
            return gr.skip(), views.status(str(error), "error")
        return recipe.to_json() if recipe.edits else "", ""

    def _apply(self, text: str) -> Sequence[Any]:
        try:
            slots, values = self.handlers.applied(text)
        except ValueError as error:
            return (*(gr.skip() for _ in range(2 + 2 * N_SLOTS + len(self.controls))), views.status(str(error), "error"))
        return (*self._edit_rows(slots, values), views.status(f"{sum(s is not None for s in slots)} edits applied"))

    def _choose(self, event: gr.EventData) -> str:
        return str(event.prompt)[:MAX_PROMPT_CHARACTERS]

    def _generate(self, request: gr.Request, prompts: str, slots: Slots, *values: Any) -> Iterator[Sequence[Any]]:
        knobs, controls = _knobs(values), values[N_KNOBS:]
        snapshot = None
        try:
            with self.handlers.turns.take(_client(request), COMPARE) as turn:
                yield (gr.skip(), _waiting(turn), None, *_buttons(running=True))
                stream = self.handlers.generate(prompts, knobs, slots, controls)
                for snapshot in _while_going(turn, stream):
                    columns = views.columns(self.handlers.session, snapshot, None)
                    yield (columns, views.progress(snapshot), snapshot, gr.skip(), gr.skip())
                if turn.stopped:
                    ended = snapshot and snapshot.ended()
                    said = views.progress(ended) if ended else views.status("Stopped.")
                    yield (gr.skip(), said, ended, gr.skip(), gr.skip())
        except ValueError as error:
            yield (gr.skip(), views.status(str(error), "error"), None, *_buttons(running=False))

    def _finish(self, snapshot: Snapshot | None, lens: int | None, slots: Slots) -> Sequence[Any]:
        """The end of a generation, or its stop: shade the texts by the open feature, or by the first that was steered."""
        if snapshot is None:
            return (gr.skip(), gr.skip(), gr.skip(), gr.skip(), *_buttons(running=False), gr.skip())
        if lens is None:
            lens = next((latent for latent in slots if latent is not None), None)
        snapshot = snapshot.ended()
        legend = views.legend(self.handlers.features, lens) if lens is not None else ""
        return (
            self.handlers.shaded(snapshot, lens),
            legend,
            views.progress(snapshot),
            snapshot,
            *_buttons(running=False),
            lens,
        )

    def _stop(self, request: gr.Request) -> None:
        self.handlers.turns.stop(_client(request), COMPARE)

    def _leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.handlers.turns.stop(_client(request))

    def _chat(
        self, request: gr.Request, message: str, messages: Sequence[tuple[str, str]], system: str, slots: Slots, *values: Any
    ) -> Iterator[Sequence[Any]]:
        if not isinstance(message, str) or not message.strip():
            yield (gr.skip(), gr.skip(), gr.skip(), views.status("The message is empty.", "error"), *_buttons(running=False))
            return
        said = (*messages, ("user", message.strip()))
        try:
            with self.handlers.turns.take(_client(request), CHAT) as turn:
                yield (views.transcript((*said, ("assistant", ""))), gr.skip(), "", _waiting(turn), *_buttons(running=True))
                stream = self.handlers.chat(said, system, _knobs(values), slots, values[N_KNOBS:])
                for text, dropped in _while_going(turn, stream):
                    now = (*said, ("assistant", text))
                    note = f"The context is full: the oldest {dropped} messages are left out." if dropped else ""
                    yield (views.transcript(now), now, gr.skip(), views.status(note), gr.skip(), gr.skip())
                if turn.stopped == RESET:
                    yield (views.transcript(()), (), "", "", gr.skip(), gr.skip())
                elif turn.stopped:
                    yield (*(gr.skip() for _ in range(3)), views.status("Stopped."), gr.skip(), gr.skip())
        except ValueError as error:
            yield (views.transcript(messages), gr.skip(), message, views.status(str(error), "error"), *_buttons(running=False))

    def _stop_chat(self, request: gr.Request) -> None:
        self.handlers.turns.stop(_client(request), CHAT)

    def _reset_chat(self, request: gr.Request) -> Sequence[Any]:
        """An empty conversation. An answer that is being written must not bring the old one back: it is told why it ends."""
        self.handlers.turns.stop(_client(request), CHAT, RESET)
        return (views.transcript(()), (), "")


def _knobs(values: Sequence[Any]) -> Knobs:
    tokens, temperature, top_p, penalty, seed = values[:N_KNOBS]
    return Knobs(max_new_tokens=tokens, temperature=temperature, top_p=top_p, repetition_penalty=penalty, seed=seed)


def _client(request: gr.Request) -> str:
    """The page that sent a request: Gradio draws a hash for every page that is loaded."""
    assert request.session_hash is not None
    return request.session_hash


def _waiting(turn: Turn) -> str:
    return views.status(f"Waiting for {turn.ahead} others…" if turn.ahead else "Reading the prompt…")


def _while_going(turn: Turn, stream: Iterator[T]) -> Iterator[T]:
    """`stream` once it is its turn, until it is stopped."""
    if not turn.wait():
        return
    for item in stream:
        yield item
        if turn.stopped:
            return


def _buttons(running: bool) -> tuple[Any, Any]:
    """Updates of a start and a stop button."""
    return gr.update(interactive=not running), gr.update(interactive=running)

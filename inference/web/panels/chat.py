"""The panel to talk with the model, steered by the edits of the page."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from inference.web import views
from inference.web.handlers import Handlers, Slots
from inference.web.panels.edits import Edits
from inference.web.panels.events import AT_ONCE, GENERATION, QUICK, buttons, client, folded, script, waiting, while_going
from inference.web.validation import MAX_PROMPT_CHARACTERS, Knobs

KIND = "chat"
RESET = "reset"
CONTINUES = "This model has learnt to continue text, not to converse: expect it to ramble. Steering works all the same."


class Chat:
    """A conversation of several turns with a system prompt."""

    def __init__(self, handlers: Handlers, edits: Edits) -> None:
        self._handlers = handlers
        self.messages = gr.State(())
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
            self.stop = gr.Button("Stop", min_width=80, scale=0, interactive=False, elem_id="chat-stop")
            self.reset = gr.Button("New chat", min_width=100, scale=0, elem_id="new-chat")
        self.status = gr.HTML("", elem_id="chat-status", apply_default_css=False)
        with folded("System prompt", "system"):
            self.system = gr.Textbox(show_label=False, lines=2, container=False, max_length=MAX_PROMPT_CHARACTERS)
        if handlers.style == "plain":
            gr.HTML(views.note(CONTINUES), apply_default_css=False)
        self._wire(edits)

    def _wire(self, edits: Edits) -> None:
        presses = [self.send.click, self.message.submit]
        # From the press until the server knows of it there is nothing that "New chat" could stop, so it cannot be pressed.
        pressed = [self.send, self.reset, self.status]
        gr.on(presses, None, None, pressed, js=script("send_pressed"), api_visibility="private")
        answering = gr.on(
            presses,
            self._chat,
            [self.message, self.messages, self.system, edits.slots, *edits.knobs, *edits.controls],
            [self.transcript, self.messages, self.message, self.status, self.send, self.stop, self.reset],
            **GENERATION,
        )
        answering.then(_ready, None, [self.send, self.stop, self.reset], **QUICK)
        self.stop.click(self._stop, None, None, **AT_ONCE)
        self.reset.click(self._reset, None, [self.transcript, self.messages, self.status], **QUICK)

    def _chat(
        self, request: gr.Request, message: str, messages: Sequence[tuple[str, str]], system: str, slots: Slots, *values: Any
    ) -> Iterator[Sequence[Any]]:
        """Every answer says what the buttons are: of two that reach the page together Gradio shows the later one alone."""
        n = len(Knobs._fields)
        try:
            if not isinstance(message, str) or not message.strip():
                raise ValueError("the message is empty; write something to answer")
            said = (*messages, ("user", message.strip()))
            with self._handlers.turns.take(client(request), KIND) as turn:
                stream = self._handlers.chat(said, system, Knobs(*values[:n]), slots, values[n:])
                now = (*said, ("assistant", ""))
                yield (views.transcript(now), gr.skip(), "", waiting(turn), *_ready(running=True))
                for i, (text, dropped) in enumerate(while_going(turn, stream)):
                    now = (*said, ("assistant", text))
                    note = f"The context is full: the oldest {dropped} messages are left out." if dropped else ""
                    yield (views.transcript(now), now, gr.skip() if i else "", views.status(note), *_ready(running=True))
                if turn.stopped == RESET:
                    yield (views.transcript(()), (), gr.skip(), "", *_ready(running=True))
                elif turn.stopped:
                    yield (views.transcript(now), gr.skip(), gr.skip(), views.status("Stopped."), *_ready(running=True))
        except ValueError as error:
            failed = (views.transcript(messages), gr.skip(), gr.update(value=message), views.status(str(error), "error"))
            yield (*failed, *_ready())

    def _stop(self, request: gr.Request) -> None:
        self._handlers.turns.stop(client(request), KIND)

    def _reset(self, request: gr.Request) -> Sequence[Any]:
        """An empty conversation. An answer that is being written must not bring the old one back: it is told why it ends."""
        self._handlers.turns.stop(client(request), KIND, RESET)
        return (views.transcript(()), (), "")


def _ready(running: bool = False) -> tuple[Any, Any, Any]:
    """Updates of the buttons to send, to stop and to begin anew."""
    return (*buttons(running), gr.update(interactive=True))

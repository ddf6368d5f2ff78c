"""What the panels share: how their events queue and what comes with them, folds, small updates that more than one makes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from inference import views
from inference.turns import RUNNING, WAITING, Turn

QUEUE_SIZE = 64
"""Small requests that may wait in Gradio's queue; generations wait in `Turns`, where they can be stopped."""
QUICK_AT_ONCE = 8
MAX_THREADS = RUNNING + WAITING + 2 * QUICK_AT_ONCE
"""A generation that waits for its turn holds a thread of the server, and must not keep small requests from theirs."""
OURS: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}
"""Of every event. Values are checked by `limits`, whose line is shown where the eye is; Gradio's own
check prints a traceback on the server and gives the page no reason."""
QUICK: dict[str, Any] = {**OURS, "concurrency_limit": QUICK_AT_ONCE, "concurrency_id": "quick"}
AT_ONCE: dict[str, Any] = {**OURS, "queue": False}
GENERATION: dict[str, Any] = {**OURS, "concurrency_limit": None, "concurrency_id": "generate"}
T = TypeVar("T")


def script(name: str) -> str:
    """The text of `assets/NAME.js`."""
    return (Path(__file__).parent.parent / "assets" / f"{name}.js").read_text(encoding="utf-8")


def mark(part: str, loading: bool) -> str:
    """A script that makes a part of the page, given by its id, look as if it is being replaced, or as if it has settled."""
    return f"() => {{ document.querySelector('#{part}').classList.toggle('loading', {str(loading).lower()}); }}"


def folded(title: str, name: str) -> gr.Column:
    """A heading, and the column below it, open from the first press of the heading on; both are on the page from the start."""
    gr.HTML(views.fold(title), elem_id=f"{name}-fold", js_on_load=script("fold"), apply_default_css=False)
    return gr.Column(elem_classes=["folded", name], elem_id=name)


def client(request: gr.Request) -> str:
    """The page that sent a request: Gradio draws a hash for every page that is loaded."""
    assert request.session_hash is not None
    return request.session_hash


def sent(event: gr.EventData, name: str) -> Any:
    """What a part of the page says about an event of its own; None where it does not say that."""
    try:
        return getattr(event, name)
    except (AttributeError, TypeError):  # it says other things, or nothing
        return None


def inputs_of(blocks: gr.Blocks) -> dict[int, tuple[str, ...]]:
    """For each event that the server answers, by its number, the JSON types of its inputs.

    "state" stands for what the server itself keeps.
    """
    return {number: tuple(map(_kind, event.inputs)) for number, event in blocks.fns.items() if event.fn is not None}


def _kind(component: Any) -> str:
    return "state" if component.stateful else str(component.api_info()["type"])


def skips(n: int) -> tuple[Any, ...]:
    """Updates that leave `n` components as they are."""
    return tuple(gr.skip() for _ in range(n))


def buttons(running: bool) -> tuple[Any, Any]:
    """Updates of a start and a stop button."""
    return gr.update(interactive=not running), gr.update(interactive=running)


def waiting(turn: Turn) -> str:
    return views.status(f"Waiting for {turn.ahead} others…" if turn.ahead else "Reading the prompt…", "busy")


def while_going(turn: Turn, stream: Iterator[T]) -> Iterator[T]:
    """`stream` once it is its turn, until it is stopped."""
    if not turn.wait():
        return
    for item in stream:
        yield item
        if turn.stopped:
            return

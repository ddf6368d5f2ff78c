"""Calls of the page's events, checked before Gradio sees them.

What the page never sends is refused in one line; Gradio would print a traceback for each such call.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from inference.asgi import Asgi, Message, Receive, RefusalLog, Scope, Send, refuse

log = logging.getLogger("inference.calls")

CALLS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
OTHERS = ("/gradio_api/cancel", "/gradio_api/reset")
"""What else takes JSON. Its fields are checked by Gradio, which fails to answer where they hold NaN."""
TYPES: Mapping[str, tuple[type, ...]] = {"string": (str,), "number": (int, float), "integer": (int, float)}
"""What a component of each JSON type sends, or null. What is sent for others (state) is not read."""
MAX_SESSION_CHARACTERS = 64
UNPROCESSABLE = 422


def problem(body: bytes, events: Mapping[int, Sequence[str]] | None) -> str | None:
    """What is wrong with the body of a call, in one line; None where the page could have sent it.

    `events` holds, for each event that the server answers, the JSON types of its inputs; None where
    the body is not that of a call.
    """
    try:
        call = json.loads(body)
        json.dumps(call, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # no JSON, NaN, infinity, lone surrogates, too deep
        return "expected a body in JSON"
    if not isinstance(call, dict):
        return f"expected an object; found {_short(call)}"
    return _problem_of_call(call, events) if events is not None else None


def _problem_of_call(call: Mapping[str, Any], events: Mapping[int, Sequence[str]]) -> str | None:
    event, session = call.get("fn_index"), call.get("session_hash")
    if type(event) is not int or event not in events:
        return f"fn_index: expected the number of an event of the page; found {_short(event)}"
    if not isinstance(session, str) or not 0 < len(session) <= MAX_SESSION_CHARACTERS:
        return f"session_hash: expected up to {MAX_SESSION_CHARACTERS} characters; found {_short(session)}"
    told = call.get("event_data")
    parts = told.values() if isinstance(told, dict) else told if isinstance(told, list) else ()
    if any(isinstance(part, dict | list) for part in parts):
        return f"event_data: expected no more than one level; found {_short(told)}"
    if call.get("batched") or call.get("simple_format"):
        return "batched, simple_format: expected false"
    return _problem_of_data(call.get("data"), events[event])


def _problem_of_data(data: Any, kinds: Sequence[str]) -> str | None:
    if not isinstance(data, list) or len(data) != len(kinds):
        found = f"{len(data)} values" if isinstance(data, list) else _short(data)
        return f"data: expected a list of {len(kinds)} values; found {found}"
    for i, (value, kind) in enumerate(zip(data, kinds, strict=True)):
        wrong = isinstance(value, bool) or not isinstance(value, TYPES.get(kind, object))
        if kind in TYPES and value is not None and wrong:
            return f"data[{i}]: expected a {kind}; found {_short(value)}"
    return None


def _short(value: Any) -> str:
    """A value from a client in a few ASCII characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


class CallCheck:
    """ASGI middleware around Gradio's server that answers 422 to calls with a `problem`.

    Gradio is asked even then, with an empty body: whoever is not logged in must hear that alone.
    """

    def __init__(self, app: Asgi, events: Mapping[int, Sequence[str]]) -> None:
        self._app, self._events = app, events
        self._log = RefusalLog(log)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in (*CALLS, *OTHERS):
            await self._app(scope, receive, send)
            return
        body = await _whole(receive)
        events = self._events if scope["path"] in CALLS else None
        wrong = "expected a body that ends" if body is None else problem(body, events)
        if wrong is None:
            await self._app(scope, _replayed(body or b"", receive), send)
        else:
            await self._app(scope, _replayed(b"", receive), self._refusing(scope, send, wrong))

    def _refusing(self, scope: Scope, send: Send, wrong: str) -> Send:
        """`send` that puts `wrong` in the place of what Gradio says of the empty body."""
        replaced = False

        async def refusing(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == UNPROCESSABLE:
                replaced = True
                self._log("call", f"a call of {scope['path']}: {wrong}")
                await refuse(scope, send, UNPROCESSABLE, wrong)
            elif not replaced:
                await send(message)

        return refusing


async def _whole(receive: Receive) -> bytes | None:
    """The body of a request, None where the client left before its end. `Guard` bounds its length."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` whole, then what comes after it."""
    left = [body]

    async def replayed() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replayed

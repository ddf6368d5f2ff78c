"""What the middleware of our servers shares: ASGI's types, headers, refusals and their log."""

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

QUIET_S = 60.0
"""Seconds between two lines of one `RefusalLog` about the same kind of refusal."""


def header(scope: Scope, name: bytes) -> list[str]:
    """Every value of a header, `name` in lower case, in the order in which they came."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def refuse(scope: Scope, send: Send, status: int, why: str) -> None:
    """Answer with `status` and one line of plain text; a websocket is closed before it opens."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{why}\n".encode()})


class RefusalLog:
    """One warning for the first refusal of a kind, then at most one every `QUIET_S`.

    A later one says how many were left out.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._spoke: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def __call__(self, kind: str, text: str) -> None:
        """`kind` is one of a few words. `text` holds no control characters, as clients write some of it."""
        now = self._clock()
        if kind in self._spoke and now - self._spoke[kind] < QUIET_S:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._spoke[kind] = now
        more = self._left_out.pop(kind, 0)
        self._log.warning("refused: %s%s", text, f" ({more:,} more since the last line)" if more else "")

"""One page's connection to the app without a browser: what a client that ignores the page's own limits can send."""

import asyncio
import contextlib
import gc
import json
import uuid
import warnings
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from inference.app import AppConfig, serve
from inference.web.handlers import Handlers

T = TypeVar("T")


def completed(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns, run on a loop of its own.

    `asyncio.run` would also forget the loop that Gradio leaves in this thread, which is then collected without being closed.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


@contextlib.contextmanager
def served(handlers: Handlers, password: str | None = None, **flags: Any) -> Iterator[str]:
    """The app in this process, on a free port, with further `flags` of AppConfig; yields its address.

    What its server leaves unclosed is collected at the end, where warnings are ignored: in a later test each would be an error,
    raised wherever Python happens to collect it.
    """
    with without_warnings():  # Gradio uses what pandas and others have deprecated
        blocks, address = serve(handlers, AppConfig(port=0, **flags), password)
    try:
        yield address.rstrip("/")
    finally:
        with without_warnings():
            server = blocks.server
            server.force_exit = True  # it would wait for clients that hold their connection, such as a page's heartbeat
            blocks.close(verbose=False)
            server.thread.join(timeout=60)
            assert not server.thread.is_alive(), "the app's server did not end"
            del blocks, server
            gc.collect()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Client:
    """Calls the events of a page over HTTP, each to its end; state of the page is kept by the server."""

    def __init__(self, address: str) -> None:
        self._http = httpx.Client(base_url=address, timeout=120)
        self._session = uuid.uuid4().hex
        config = self._http.get("/config").raise_for_status().json()
        ids = {part["props"]["elem_id"]: part["id"] for part in config["components"] if part["props"].get("elem_id")}
        self._events = {
            (name, target[1]): found["id"]
            for found in config["dependencies"]
            for name, number in ids.items()
            for target in found["targets"]
            if target[0] == number and found["backend_fn"]
        }
        self._after = {found["trigger_after"]: found["id"] for found in config["dependencies"]}
        self._inputs = {found["id"]: len(found["inputs"]) for found in config["dependencies"]}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def event(self, name: str, kind: str = "click") -> int:
        """The number of what happens on `kind` of the component whose id in the page is `name`."""
        return int(self._events[name, kind])

    def after(self, event: int) -> int:
        """The number of what happens after `event`."""
        return int(self._after[event])

    def join(self, event: int, values: Sequence[Any]) -> httpx.Response:
        """Put a call into the queue."""
        assert len(values) == self._inputs[event], f"expected {self._inputs[event]} values, found {len(values)}"
        body = {"data": list(values), "fn_index": event, "session_hash": self._session}
        return self._http.post("/gradio_api/queue/join", json=body)

    def call(self, event: int, values: Sequence[Any]) -> list[dict[str, Any]]:
        """Every answer of a call until it ends, as Gradio sends them: the first whole, later ones as differences."""
        wanted = self.join(event, values).raise_for_status().json()["event_id"]
        answers = []
        with self._http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self._session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("event_id") != wanted:
                    continue
                if message["msg"] in ("process_generating", "process_completed"):
                    assert message["success"], message
                    answers.append(message["output"])
                if message["msg"] == "process_completed":
                    break
        return answers

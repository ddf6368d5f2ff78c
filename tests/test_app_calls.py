"""Calls that no page sends: each is answered 4xx or with a line for the page, never with a traceback on the server."""

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
import torch

from core.cli import parse
from inference.app import AppConfig, open_handlers
from inference.calls import CALLS, MAX_SESSION_CHARACTERS, TYPES, problem
from inference.handlers import BY_LABEL, N_SLOTS, Controls, Handlers
from inference.limits import Knobs
from inference.panels.events import inputs_of
from tests.app_client import Client, served
from tests.tiny import tiny_llama
from tests.tiny_features import LABELS, tiny_sae, write_features

pytestmark = pytest.mark.filterwarnings("ignore")  # Gradio's server runs in this process, and uses what pandas has deprecated

UNUSED = tuple(Controls()) * N_SLOTS
KNOBS = Knobs(max_new_tokens=2)
EVENTS = {3: ("string", "state", "number"), 7: ()}
GOOD = {"fn_index": 3, "data": ["the storm", None, 0.5], "session_hash": "page"}
"""A call of an event of `EVENTS`."""


def body(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


@pytest.mark.parametrize(
    "changes",
    [{}, {"data": [None, {"any": "thing"}, None]}, {"data": ["", None, -3]}, {"event_data": None}, {"trigger_id": 5},
     {"event_data": {"latent": 5, "site": ""}}, {"event_data": "storms"}, {"event_data": [1, 2]},
     {"fn_index": 7, "data": []}, {"batched": False}, {"of_a_later_gradio": [1]}],
)  # fmt: skip
def test_what_the_page_sends_passes(changes: Mapping[str, Any]) -> None:
    assert problem(body(**changes), EVENTS) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fn_index": -1}, "fn_index: .*-1"),
        ({"fn_index": 4}, "fn_index: .*4"),
        ({"fn_index": None}, "fn_index: .*null"),
        ({"fn_index": "3"}, 'fn_index: .*"3"'),
        ({"fn_index": 3.0}, "fn_index: .*3.0"),
        ({"fn_index": True}, "fn_index: .*true"),
        ({"fn_index": [3]}, "fn_index: "),
        ({"session_hash": None}, "session_hash: .*null"),
        ({"session_hash": ""}, "session_hash: "),
        ({"session_hash": 5}, "session_hash: .*5"),
        ({"session_hash": "x" * (MAX_SESSION_CHARACTERS + 1)}, "session_hash: "),
        ({"data": None}, "data: .* 3 values; found null"),
        ({"data": {"0": 1}}, "data: .* 3 values"),
        ({"data": []}, "data: .* 3 values; found 0 values"),
        ({"data": ["a", None, 1, 1]}, "data: .*found 4 values"),
        ({"data": [1, None, 1]}, r"data\[0\]: expected a string; found 1"),
        ({"data": [["a"], None, 1]}, r"data\[0\]: expected a string"),
        ({"data": ["a", None, "1"]}, r'data\[2\]: expected a number; found "1"'),
        ({"data": ["a", None, True]}, r"data\[2\]: expected a number; found true"),
        ({"data": ["a", None, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}, r"data\[2\]: "),
        ({"data": ["a", None, float("nan")]}, "JSON"),
        ({"data": ["a", None, float("inf")]}, "JSON"),
        ({"data": ["a\ud800", None, 1]}, "JSON"),
        ({"event_data": [[1]]}, "event_data: "),
        ({"event_data": {"latent": [1]}}, "event_data: "),
        ({"batched": True}, "batched"),
        ({"simple_format": True}, "simple_format"),
    ],
)
def test_what_it_never_sends_is_named(changes: Mapping[str, Any], said: str) -> None:
    found = problem(body(**changes), EVENTS)
    assert found is not None
    assert pytest.raises(AssertionError, match=said).matches(AssertionError(found))
    assert len(found) < 150
    assert found.isascii()
    assert found.isprintable()


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null", b"[" * 100_000, b"1" * 5000, b'{"fn_index":1e999}', b"\x00"]
)
def test_bodies_that_are_no_calls(text: bytes) -> None:
    assert problem(text, EVENTS) is not None


# The server


@pytest.fixture(scope="module")
def handlers(tmp_path_factory: pytest.TempPathFactory) -> Handlers:
    folder = tmp_path_factory.mktemp("calls")
    model = tiny_llama(folder / "model", max_seq_len=256)
    flags = [*write_features(folder, model, tiny_sae(model, "layers.1.resid_post")).flags, "--style", "plain"]
    return open_handlers(parse(AppConfig, "", flags), torch.device("cpu"))


@pytest.fixture(scope="module")
def address(handlers: Handlers) -> Iterator[str]:
    with served(handlers) as opened:
        yield opened


def test_every_input_has_a_known_type(handlers: Handlers, address: str) -> None:
    assert address  # Gradio is imported as the app does it
    from inference.layout import Page

    found = inputs_of(Page(handlers).blocks)
    assert len(found) > 20
    assert {kind for kinds in found.values() for kind in kinds} == {"state", *TYPES}


STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2.5, 10**30, 10**4000, 1e308, float("nan"), float("-inf"), "", "5", "x" * 10_000, "\x00\x1b[31m",
    "\ud800", "\u202e", [], [[]], ["a"], {}, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"__type__": "update"}, {"value": {"value": 1}}, [1] * 1000,
)  # fmt: skip


def good_calls(client: Client) -> list[dict[str, Any]]:
    """One of each kind of event, as the page sends it."""
    values = {
        ("query", "change"): ["", BY_LABEL, "storms"],
        ("query", "submit"): ["", BY_LABEL, "storms", None],
        ("generate", "click"): ["the storm", None, *KNOBS, *UNUSED],
        ("send", "click"): ["hello", None, "", None, *KNOBS, *UNUSED],
        ("apply", "click"): ["{}"],
        ("stop", "click"): [],
        ("new-chat", "click"): [],
        ("results", "open"): [None],
        ("results", "steer"): [None, *UNUSED],
    }
    calls = [{"fn_index": client.event(*event), "data": data, "session_hash": "fuzz"} for event, data in values.items()]
    return [call | {"event_data": {"latent": 5, "site": ""}} for call in calls]


def spoilt(draw: random.Random, good: Mapping[str, Any]) -> dict[str, Any]:
    """A call with one or two things in it that are not as they should be."""
    call = dict(good)
    for _ in range(draw.randint(1, 2)):
        match draw.choice(("value", "value", "value", "length", "key", "told")):
            case "value" if call["data"] and isinstance(call["data"], list):
                at = draw.randrange(len(call["data"]))
                call["data"] = [*call["data"][:at], draw.choice(STRANGE), *call["data"][at + 1 :]]
            case "length" if isinstance(call["data"], list):
                call["data"] = call["data"][:-1] if draw.random() < 0.5 else [*call["data"], draw.choice(STRANGE)]
            case "key":
                keys = [*call, "fn_index", "trigger_id", "event_id", "batched", "simple_format", "oauth_token", "other"]
                call[draw.choice(keys)] = draw.choice(STRANGE)
            case _:
                call["event_data"] = {"latent": draw.choice(STRANGE), "site": draw.choice(STRANGE)}
    return call


def events_of(http: httpx.Client, session: str, wanted: str) -> list[dict[str, Any]]:
    """What the page is sent about a queued call, to its end."""
    found = []
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("event_id") == wanted:
                found.append(message)
                if message["msg"] == "process_completed":
                    break
    return found


def test_a_fuzzed_server_prints_no_traceback(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    """300 spoilt calls: 4xx, or an answer that the page shows. Afterwards the server does what it is for."""
    draw, refused, answered = random.Random(0), 0, 0
    with Client(address) as client, httpx.Client(base_url=address, timeout=120) as http:
        good = good_calls(client)
        for _ in range(300):
            call, path = spoilt(draw, draw.choice(good)), draw.choice(CALLS)
            answer = http.post(path, content=json.dumps(call), headers={"Content-Type": "application/json"})
            assert answer.status_code < 500, (path, str(call)[:500], answer.text)
            refused += answer.status_code >= 400
            if answer.status_code == 200 and path == CALLS[0]:
                *_, last = events_of(http, str(call["session_hash"]), answer.json()["event_id"])
                assert last["success"], (str(call)[:500], last)
                answered += 1
        (found,) = client.call(client.event("query", "change"), ["", BY_LABEL, "storms"])
        assert LABELS[0] in found["data"][0]
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out
    assert refused > 50
    assert answered > 25


@pytest.mark.parametrize("path", CALLS)
def test_refused_calls_are_a_line_each(handlers: Handlers, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """For the client; in the log many are one line. Without the password nothing is said but that one is needed."""
    bad: list[bytes] = [b"{", b"[" * 100_000, b"{}", json.dumps({"fn_index": -1, "data": [], "session_hash": "x"}).encode()]
    with served(handlers) as opened, httpx.Client(base_url=opened) as http:
        for content in bad:
            answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 422
            assert answer.text.count("\n") == 1
        chunks = http.post(path, content=(b"x" * 2**16 for _ in range(64)))
        assert chunks.status_code == 422
    assert len([record for record in caplog.records if record.name == "inference.calls"]) == 1
    with served(handlers, "correct horse") as opened, httpx.Client(base_url=opened) as http:
        for content in bad:
            assert http.post(path, content=content).status_code == 401


def test_out_of_range_is_answered_in_place(address: str) -> None:
    """By the line of `limits`, not by Gradio's own check, which has no line for the page."""
    with Client(address) as client:
        knobs = KNOBS._replace(temperature=500)
        answer = client.call(client.event("generate"), ["the storm", None, *knobs, *UNUSED])
        assert "temperature must be a number from 0 to 5; found 500" in str(answer)
        (shown,) = client.call(client.event("query", "change"), ["nowhere", BY_LABEL, "storms"])
        assert "no SAE is loaded at" in str(shown)
        (chosen,) = client.call(client.event("results", "open"), [None])
        assert "a latent is a whole number" in str(chosen)


@pytest.mark.parametrize("path", ["/?page=x", "/?deep_link=x", "/?page=..&latent=5", "/config?page=x"])
def test_there_is_one_page(address: str, path: str) -> None:
    assert httpx.get(address + path).status_code == 404
    assert httpx.get(f"{address}/?latent=%ff&site=&page=").status_code == 200


@pytest.mark.parametrize("path", ["/gradio_api/cancel", "/gradio_api/reset", "/login"])
def test_other_posts_are_checked_too(address: str, path: str, capfd: pytest.CaptureFixture[str]) -> None:
    with httpx.Client(base_url=address) as http:
        for value in STRANGE:
            content = json.dumps({"session_hash": value, "fn_index": value, "event_id": value})
            for kind in ("application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "?"):
                assert http.post(path, content=content, headers={"Content-Type": kind}).status_code < 500
    assert "Traceback" not in capfd.readouterr().err

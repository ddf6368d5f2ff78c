"""`HostGuard` alone, around applications that are not Gradio: which requests pass, and what is said of the others."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import fastapi
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.cli import parse
from inference.app import AppConfig
from inference.web.asgi import QUIET_S, RefusalLog
from inference.web.hosts import LOOPBACK, HostGuard, authority, is_origin_of, served_names
from tests.app_client import completed

Headers = Sequence[tuple[str, str]]


def asked(guard: HostGuard, headers: Headers, path: str = "/", method: str = "GET", kind: str = "http") -> list[Any]:
    """What the guard, or the application behind it, sends for one request."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body was read")

    scope: dict[str, Any] = {
        "type": kind, "path": path, "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
    }  # fmt: skip
    if kind == "http":
        scope["method"] = method
    completed(guard(scope, receive, send))
    return sent


async def answering(scope: Any, receive: Any, send: Any) -> None:
    """The application: it answers 200 with the headers that it saw."""
    await send({"type": "http.response.start", "status": 200, "headers": scope.get("headers", [])})


def status(headers: Headers, names: Collection[str] = LOOPBACK, **request: Any) -> int:
    return int(asked(HostGuard(answering, names), headers, **request)[0]["status"])


def of(host: str, origin: str | None = None, **others: str) -> Headers:
    more = [(name.replace("_", "-"), value) for name, value in others.items()]
    return [("Host", host), *([("Origin", origin)] if origin is not None else []), *more]


# Hosts


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:7860", "localhost", "localhost:80", "LOCALHOST:7860", "LocalHost.:7860", "localhost.",
     "localhost:", "[::1]", "[::1]:7860", "[0:0:0:0:0:0:0:1]:7860", "[::0001]"],
)  # fmt: skip
def test_loopback_passes_at_any_port(host: str) -> None:
    assert status(of(host)) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "evil.localhost", "localhost..",
     "127.0.0.2", "127.1", "2130706433", "0x7f.0.0.1", "0.0.0.0:7860", "[::]", "[::ffff:127.0.0.1]", "192.168.1.5:7860"],
)  # fmt: skip
def test_other_hosts_are_misdirected(host: str) -> None:
    """Pages too, whatever the method, and whatever a proxy's header says."""
    for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT"):
        assert status(of(host), method=method) == 421
    assert status(of(host, x_forwarded_host="127.0.0.1", forwarded="host=127.0.0.1")) == 421
    assert status(of(host, f"http://{host}")) == 421


@pytest.mark.parametrize(
    "headers",
    [[], [("Host", "localhost"), ("Host", "evil.example")], [("Host", "localhost"), ("Host", "localhost")], of(""), of("."),
     of(":7860"), of("localhost:x"), of("localhost:99999"), of("localhost:7860:1"), of("localhost, evil.example"),
     of("user@localhost"), of("localhost/"), of("http://localhost"), of("::1"), of("[::1"), of("[::g]"), of("[localhost]"),
     of("loc\x9balhost"), of("localhost\n"), of("localhost evil.example"), of("*")],
)  # fmt: skip
def test_one_well_formed_host_is_needed(headers: Headers) -> None:
    assert status(headers) == 400


def test_a_target_that_names_a_host_of_its_own_is_refused() -> None:
    """What servers make of `GET http://evil.example/config`, and of CONNECT."""
    for path in ("http://evil.example/config", "http://127.0.0.1/config", "evil.example:80", "*", ""):
        assert status(of("127.0.0.1"), path=path) == 400


def test_flags_give_names() -> None:
    assert served_names("127.0.0.1", ()) == LOOPBACK
    assert served_names("fe80::1%eth0", ["Lab.Example.", "[2001:DB8:0::1]", "192.168.1.5"]) == {
        *LOOPBACK, "fe80::1", "lab.example", "2001:db8::1", "192.168.1.5",
    }  # fmt: skip
    names = served_names("192.168.1.5", ["lab.example"])
    for host, passes in (("192.168.1.5:1", True), ("LAB.example.:2", True), ("localhost:3", True), ("192.168.1.6", False)):
        assert (status(of(host), names) == 200) == passes
    everywhere = served_names("0.0.0.0", ["lab.example"])
    for host, passes in (("lab.example", True), ("[::1]", True), ("192.168.1.5", False), ("evil.example", False)):
        assert (status(of(host), everywhere) == 200) == passes


@pytest.mark.parametrize(
    "name", ["", "*", "*.example", "lab.example:80", "http://lab.example", "a b", "[::g]", "bücher.example"]
)
def test_a_flag_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="--allow-host"):
        parse(AppConfig, "", ["--allow-host", "lab.example", name])
    with pytest.raises(ValueError, match="--host"):
        served_names(name, ())


def test_names_may_grow() -> None:
    """As the address of a public link is known only once the server runs."""
    names = served_names("127.0.0.1", ())
    guard = HostGuard(answering, names)
    assert asked(guard, of("new.example"))[0]["status"] == 421
    names.add("new.example")
    assert asked(guard, of("new.example"))[0]["status"] == 200


labels = st.text("abcXYZ019-_", min_size=1, max_size=12)


@given(st.lists(labels, min_size=1, max_size=4), st.integers(-1, 65535), st.booleans())
def test_only_the_given_names_pass(parts: list[str], port: int, dot: bool) -> None:
    """Against a comparison of the name alone, whatever its case, port and final dot."""
    name = ".".join(parts)
    host = f"{name}{'.' if dot else ''}{f':{port}' if port >= 0 else ''}"
    assert (status(of(host), {"abc.xyz"}) == 200) == (name.lower() == "abc.xyz")
    assert status(of(host), {name.lower()}) == 200
    assert status(of(host), {f"x{name.lower()}", name.lower()[1:]}) == 421


@given(st.binary(max_size=40))
def test_no_host_is_an_error_of_ours(host: bytes) -> None:
    assert status(of(host.decode("latin-1"))) in (200, 400, 421)


# Origins


@pytest.mark.parametrize(
    ("host", "origin"),
    [("127.0.0.1:7860", "http://127.0.0.1:7860"), ("localhost:7860", "http://localhost:7860"), ("localhost", "http://localhost"),
     ("localhost", "http://localhost:80"), ("localhost:443", "https://localhost"), ("LOCALHOST:1", "http://localhost:1"),
     ("[::1]:7860", "http://[::1]:7860"), ("lab.example", "https://lab.example"), ("lab.example:8443", "https://lab.example:8443")],
)  # fmt: skip
def test_our_own_pages_may_call(host: str, origin: str) -> None:
    names = served_names("127.0.0.1", ["lab.example"])
    for method in ("GET", "POST"):
        assert status(of(host, origin, sec_fetch_site="same-origin"), names, method=method, path="/call") == 200


@pytest.mark.parametrize(
    "origin",
    ["null", "", "http://evil.example", "http://evil.example:7860", "http://127.0.0.1:3000", "http://127.0.0.1",
     "http://localhost:7860", "http://[::1]:7860", "https://127.0.0.1", "127.0.0.1:7860", "//127.0.0.1:7860",
     "file://127.0.0.1:7860", "chrome-extension://127.0.0.1:7860", "http://127.0.0.1:7860/", "http://127.0.0.1:7860.evil.example",
     "http://127.0.0.1:7860@evil.example", "http://user@127.0.0.1:7860", "http://127.0.0.1:7860, http://127.0.0.1:7860"],
)  # fmt: skip
def test_pages_of_other_origins_may_not_call(origin: str) -> None:
    """Those of other ports of this machine are others' too."""
    names = served_names("127.0.0.1", ["lab.example"])
    for method in ("GET", "POST", "OPTIONS"):
        assert status(of("127.0.0.1:7860", origin), names, method=method, path="/call") == 403
    assert not asked(HostGuard(answering, names), of("127.0.0.1:7860", origin), kind="websocket")[0].get("status")


def test_two_origins_are_refused() -> None:
    own = ("Origin", "http://localhost")
    assert status([*of("localhost"), own]) == 200
    assert status([*of("localhost"), own, own]) == 403


def test_clients_that_are_no_browsers_pass() -> None:
    for method in ("GET", "POST", "DELETE"):
        assert status(of("127.0.0.1:7860", user_agent="curl/8"), method=method, path="/v1/completions") == 200


def test_other_sites_may_link_to_pages_only() -> None:
    """Images, scripts and links carry no Origin; what a browser says of them is in Sec-Fetch-*."""

    def fetched(site: str, mode: str, path: str, method: str = "GET") -> int:
        return status(of("localhost", sec_fetch_site=site, sec_fetch_mode=mode), path=path, method=method)

    for site in ("cross-site", "same-site"):
        assert fetched(site, "navigate", "/") == 200
        assert fetched(site, "navigate", "/", "POST") == 403
        assert fetched(site, "navigate", "/logout") == 403
        for mode in ("no-cors", "cors", "websocket", ""):
            assert fetched(site, mode, "/") == 403
    for site in ("same-origin", "none"):
        assert fetched(site, "no-cors", "/assets/index.js") == 200
        assert fetched(site, "navigate", "/logout") == 200


@given(st.text(max_size=40))
def test_an_origin_is_ours_only_if_it_is_spelt_so(text: str) -> None:
    host = authority("localhost:7860")
    assert host is not None
    assert not is_origin_of(text, host)
    assert not is_origin_of(f"http://localhost:7860{text}", host) or not text.strip("0123456789")


# What it stands before


def test_no_header_of_a_proxy_reaches_the_application() -> None:
    headers = [*of("localhost", x_forwarded_host="evil.example", forwarded="host=evil.example"), ("Accept", "*/*")]
    seen = asked(HostGuard(answering, LOOPBACK), headers)[0]["headers"]
    assert seen == [(b"host", b"localhost"), (b"accept", b"*/*")]


def test_websockets_are_held_to_the_same() -> None:
    guard = HostGuard(answering, LOOPBACK)
    refused = [{"type": "websocket.close", "code": 1008}]
    assert asked(guard, of("localhost:1", "http://localhost:1"), kind="websocket")[0]["status"] == 200
    assert asked(guard, of("localhost:1"), kind="websocket")[0]["status"] == 200
    assert asked(guard, of("evil.example:1", "http://evil.example:1"), kind="websocket") == refused
    assert asked(guard, of("localhost:1", "http://evil.example"), kind="websocket") == refused
    assert asked(guard, of("localhost:1", "null"), kind="websocket") == refused


def test_the_start_of_a_server_passes() -> None:
    assert asked(HostGuard(answering, LOOPBACK), [], kind="lifespan")[0]["status"] == 200


def test_a_fastapi_server_takes_it() -> None:
    """As the HTTP API does, without Gradio."""
    app = fastapi.FastAPI()
    app.add_middleware(HostGuard, names=served_names("127.0.0.1", ["lab.example"]))
    calls: list[str] = []

    @app.post("/v1/completions")
    def complete(prompt: str) -> str:
        calls.append(prompt)
        return "text"

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
            requests = (
                {},
                {"host": "lab.example"},
                {"host": "evil.example"},
                {"origin": "null"},
                {"origin": "http://localhost:1"},
            )
            return [(await client.post("/v1/completions?prompt=a", headers=headers)).status_code for headers in requests]

    assert completed(statuses()) == [200, 200, 421, 403, 403]
    assert calls == ["a", "a"]


# What it says


def test_a_refusal_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    guard = HostGuard(answering, LOOPBACK)
    start, body = asked(guard, of("evil.example"), path="/config")
    assert start["status"] == 421
    assert body["body"].count(b"\n") == 1
    assert b"--allow-host" in body["body"]
    asked(guard, of("localhost", "http://evil\x1b[31m\x9b.example"), path="/a\nb", method="POST")
    asked(guard, of("x" * 5000))
    (host, origin) = [record.getMessage() for record in caplog.records]
    assert "'evil.example'" in host
    assert "--allow-host" in host
    assert "evil\\x1b[31m\\x9b" in origin
    assert "'/a\\nb'" in origin
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_many_refusals_are_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    say = RefusalLog(logging.getLogger("inference.web.hosts"), clock=lambda: now[0])
    for i in range(1000):
        say("host", f"number {i}")
    say("origin", "another kind")
    now[0] = QUIET_S
    say("host", "later")
    say("host", "left out")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(": ", 1)[1] for line in lines] == ["number 0", "another kind", "later (999 more since the last line)"]

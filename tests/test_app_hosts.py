"""Other sites and the app: what its server answers to their names and origins, what their pages get in a real browser."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from playwright.sync_api import Browser, Page, Response, expect

from core.cli import parse
from inference.app import AppConfig, open_handlers
from inference.guard import EXACT
from inference.handlers import BY_LABEL, Handlers
from tests.app_client import Client, served
from tests.browser import free_port, open_browser
from tests.tiny import tiny_llama
from tests.tiny_features import LABELS, tiny_sae, write_features

pytestmark = pytest.mark.filterwarnings("ignore")  # Gradio's server runs in this process, and uses what pandas has deprecated

EVIL = "evil.example"
SECRET = "layers.1.resid_post"
"""Stands in everything that the app says of its SAE."""
PATHS = [*sorted(EXACT), "/assets/x.js", "/static/x", "/gradio_api/heartbeat/x", "/openapi.json"]


class Counted(Handlers):
    """Counts the searches, whoever asks for them."""

    def find(self, site: Any, scope: Any, text: Any) -> str:
        self.searched.append(text)
        return super().find(site, scope, text)

    @property
    def searched(self) -> list[Any]:
        found: list[Any] = self.__dict__.setdefault("_searched", [])
        return found


@pytest.fixture(scope="module")
def handlers(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    folder = tmp_path_factory.mktemp("hosts")
    model = tiny_llama(folder / "model", max_seq_len=256)
    flags = [*write_features(folder, model, tiny_sae(model, SECRET)).flags, "--style", "plain"]
    return Counted(open_handlers(parse(AppConfig, "", flags), torch.device("cpu")).session, "plain")


@pytest.fixture(scope="module")
def address(handlers: Counted) -> Iterator[str]:
    with served(handlers) as opened:
        yield opened


def search_call(address: str) -> dict[str, Any]:
    """The body of a call that searches features."""
    with Client(address) as client:
        return {"fn_index": client.event("query", "change"), "data": ["", BY_LABEL, "storms"], "session_hash": "other"}


# The server


@pytest.mark.parametrize("path", PATHS)
def test_another_host_gets_nothing(address: str, path: str) -> None:
    with httpx.Client(base_url=address) as http:
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            for host in (EVIL, f"{EVIL}:{httpx.URL(address).port}", "127.0.0.1.evil.example"):
                answer = http.request(method, path, headers={"Host": host, "X-Forwarded-Host": "127.0.0.1"})
                assert answer.status_code == 421
                assert SECRET not in answer.text
        for origin in (f"http://{EVIL}", "null", "http://localhost:1"):
            preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            for method in ("GET", "POST", "OPTIONS"):
                answer = http.request(method, path, headers=preflight)
                assert answer.status_code == 403
                assert "access-control-allow-origin" not in answer.headers


def test_own_names_and_clients_are_served(address: str, handlers: Counted) -> None:
    call, port = search_call(address), httpx.URL(address).port
    with httpx.Client(base_url=address) as http:
        for name in ("127.0.0.1", "localhost", "LOCALHOST.", "[::1]"):
            host = f"{name}:{port}"
            for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host.lower()}"}):
                assert SECRET in http.get("/config", headers=headers).text
                before = len(handlers.searched)
                assert http.post("/gradio_api/run/predict", json=call, headers=headers).status_code == 200
                assert len(handlers.searched) == before + 1
        for header in ("X-Forwarded-Host", "X-Gradio-Server", "Forwarded"):
            assert EVIL not in http.get("/config", headers={header: f"http://{EVIL}"}).text


def raw(address: str, lines: list[str]) -> str:
    """The answer to a request as it stands on the line."""
    url = httpx.URL(address)
    assert url.port is not None
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    return answer.decode("utf-8", "replace")


@pytest.mark.parametrize(
    "lines",
    [
        ["GET /config HTTP/1.1"],
        ["GET /config HTTP/1.0"],
        ["GET /config HTTP/1.1", "Host: 127.0.0.1", f"Host: {EVIL}"],
        ["GET /config HTTP/1.1", "Host: 127.0.0.1", "Host: 127.0.0.1"],
        ["GET /config HTTP/1.1", f"Host: 127.0.0.1@{EVIL}"],
        ["GET /config HTTP/1.1", "Host:"],
        [f"GET http://{EVIL}/config HTTP/1.1", "Host: 127.0.0.1"],
        [f"GET http://{EVIL}/config HTTP/1.1", f"Host: {EVIL}"],
        ["GET http://127.0.0.1/config HTTP/1.1", f"Host: {EVIL}"],
        [f"CONNECT {EVIL}:80 HTTP/1.1", "Host: 127.0.0.1"],
        ["GET /config HTTP/1.1", f"Host: {EVIL}", "Upgrade: websocket", "Connection: Upgrade",
         "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13"],
    ],
)  # fmt: skip
def test_requests_that_no_browser_sends(address: str, lines: list[str]) -> None:
    answer = raw(address, lines)
    assert answer.split()[1] in ("400", "403", "404", "421")
    assert SECRET not in answer
    assert SECRET in raw(address, ["GET /config HTTP/1.1", "Host: 127.0.0.1"])


def test_calls_of_other_origins_do_nothing(handlers: Counted, caplog: pytest.LogCaptureFixture) -> None:
    """However many there are, one line of the log says so."""
    with served(handlers) as address, httpx.Client(base_url=address) as http:
        call = search_call(address)
        before = len(handlers.searched)
        for _ in range(20):
            for origin in (f"http://{EVIL}", "null", "http://localhost:1"):
                for path in ("/gradio_api/run/predict", "/gradio_api/queue/join"):
                    assert http.post(path, json=call, headers={"Origin": origin}).status_code == 403
        assert len(handlers.searched) == before
    said = [record.getMessage() for record in caplog.records if record.name == "inference.hosts"]
    assert len(said) == 1
    assert EVIL in said[0]


@pytest.mark.parametrize(("host", "url"), [("::1", "http://[::1]"), ("0.0.0.0", "http://127.0.0.1"), ("::", "http://[::1]")])
def test_other_addresses_to_serve_on(
    handlers: Counted, tmp_path: Path, host: str, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bound to all addresses, names other than loopback's must be given."""
    password = tmp_path / "password"
    with served(handlers, host=host, password_file=password) as opened:
        port = httpx.URL(opened).port
        with httpx.Client(base_url=f"{url}:{port}") as http:
            for name, expected in ((None, 200), ("localhost", 200), ("192.168.1.5", 421), ("lab.example", 421)):
                assert http.get("/", headers={"Host": f"{name}:{port}"} if name else {}).status_code == expected
    assert ("without --allow-host" in caplog.text) == (host != "::1")
    with (
        served(handlers, host=host, password_file=password, allow_host=("lab.example",)) as opened,
        httpx.Client(base_url=f"{url}:{httpx.URL(opened).port}") as http,
    ):
        assert http.get("/config", headers={"Host": "lab.example", "Origin": "https://lab.example"}).status_code == 200
        assert http.get("/config", headers={"Host": EVIL}).status_code == 421


# A browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One that takes this machine for evil.example, as a rebound name would have it."""
    expect.set_options(timeout=30_000)
    with open_browser(f"--host-resolver-rules=MAP {EVIL} 127.0.0.1") as opened:
        yield opened


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with contextlib.closing(browser.new_page(viewport={"width": 1440, "height": 1000})) as opened:
        opened.set_default_timeout(30_000)
        yield opened


ATTACK = """async ([app, call]) => {
    const asked = async (path, options) => {
        try {
            const answer = await fetch(app + path, options);
            return [answer.status, await answer.text()];
        } catch (error) {
            return [0, String(error)];
        }
    };
    const post = (type, mode) => ({method: 'POST', mode, headers: {'content-type': type}, body: JSON.stringify(call)});
    return {
        config: await asked('/config'),
        run: await asked('/gradio_api/run/predict', post('application/json', 'cors')),
        join: await asked('/gradio_api/queue/join', post('application/json', 'cors')),
        blind: await asked('/gradio_api/run/predict', post('text/plain', 'no-cors')),
    };
}"""
"""What a page tries: to read, to call and read the answer, to call without reading it. Status 0: the browser refused."""


def rebound(page: Page, address: str, call: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """What a page of the origin evil.example gets from the app once that name stands for this machine."""
    page.goto(f"http://{EVIL}:{httpx.URL(address).port}/")
    got: dict[str, tuple[int, str]] = page.evaluate(ATTACK, ["", call])
    return got


def test_a_rebound_name_gets_nothing(page: Page, address: str, handlers: Counted) -> None:
    call, before = search_call(address), len(handlers.searched)
    got = rebound(page, address, call)
    assert [status for status, _ in got.values()] == [421] * 4
    assert SECRET not in json.dumps(got)
    assert len(handlers.searched) == before
    expect(page.locator("body")).to_contain_text("does not answer to this host name")
    assert page.evaluate("location.hostname") == EVIL


def test_the_attack_works_where_it_is_let_in(page: Page, handlers: Counted) -> None:
    """The attack is a real one: once its name is allowed it reads and calls, and the page opens under it."""
    with served(handlers, allow_host=(EVIL,)) as address:
        before = len(handlers.searched)
        got = rebound(page, address, search_call(address))
        assert [got[part][0] for part in ("config", "run", "join")] == [200, 200, 200]
        assert SECRET in got["config"][1]
        assert LABELS[0] in got["run"][1]
        assert len(handlers.searched) > before
        use(page, f"http://{EVIL}:{httpx.URL(address).port}")
        page.close()  # before its server, which waits for open connections


PAGE = """<!doctype html><title>another page</title><a href="APP/?latent=5">the app</a>
<img src="APP/logout"><script src="APP/config"></script><iframe name="inner"></iframe>
<iframe sandbox="allow-scripts" srcdoc="<script>fetch('APP/config').catch(() => 0)</script>"></iframe>
<form method="post" action="APP/gradio_api/run/predict" target="inner"><input name="data"></form>"""


@contextlib.contextmanager
def other_site(app: str) -> Iterator[int]:
    """A server of `PAGE` on another port of this machine; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = PAGE.replace("APP", app).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", free_port()), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", [EVIL, "127.0.0.1", "localhost"])
def test_pages_of_other_origins_may_only_link(page: Page, address: str, handlers: Counted, name: str) -> None:
    """Those on another port of this machine too. Every request of theirs that reaches the app is refused."""
    call, before = search_call(address), len(handlers.searched)
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer))
    with other_site(address) as port:
        page.goto(f"http://{name}:{port}/")
        got = page.evaluate(ATTACK, [address, call])
        assert [status for status, _ in got.values()] == [0] * 4
        page.locator("form").evaluate("(form) => form.submit()")
        page.frame_locator("[name=inner]").get_by_text("may not call").wait_for()
        refused = [answer for answer in answers if answer.url.startswith(address)]
        assert {answer.status for answer in refused} == {403}
        assert {httpx.URL(answer.url).path for answer in refused} >= {"/config", "/logout", "/gradio_api/run/predict"}
        assert len(handlers.searched) == before
        page.get_by_role("link").click()
        expect(page.locator("#card h2")).to_have_text(LABELS[5])


def use(page: Page, address: str) -> None:
    """The app does what it is for, and the browser has nothing to complain of."""
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda answer: problems.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    page.goto(address)
    page.locator("#query textarea").fill("storms")
    expect(page.locator("#results .hits li").first).to_contain_text(LABELS[0])
    page.locator("#generate").click()
    expect(page.locator("#columns .baseline .new")).not_to_be_empty()
    expect(page.locator("#generate")).to_be_enabled()
    assert problems == []


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_the_app_works_under_its_own_names(page: Page, address: str, name: str) -> None:
    use(page, f"http://{name}:{httpx.URL(address).port}")


def test_the_login_page_is_no_other_origin(page: Page, handlers: Counted) -> None:
    with served(handlers, "correct horse") as address:
        page.goto(address)
        page.locator("input[type=password]").fill("correct horse")
        page.locator("input:not([type=password]), textarea").first.fill("workbench")
        page.get_by_role("button", name="Login").click()
        expect(page.locator("#results .hits li").first).to_be_visible()
        page.close()

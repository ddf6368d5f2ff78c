"""The app's server: who reaches it, what it serves, and that many users at once get what each would get alone."""

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from core.cli import parse
from inference.app import AppConfig, ignore_gradio_variables, open_handlers, read_password, serve
from inference.session import Feature
from inference.steering import Edit, Recipe
from inference.web.handlers import N_SLOTS, NO_SLOTS, Controls, Handlers, Slots
from inference.web.middleware import MAX_BODY_BYTES, Guard, is_known
from inference.web.queue import Turns
from inference.web.validation import Knobs
from llama3.sites import ActiveHooks
from tests.app_client import Client, completed, served
from tests.browser import running_app
from tests.tiny import tiny_llama
from tests.tiny_features import flags_of, tiny_sae, write_features

pytestmark = pytest.mark.filterwarnings("ignore")  # Gradio's server runs in this process, and uses what pandas has deprecated

UNUSED = tuple(Controls()) * N_SLOTS
NEW_TOKENS = 6
PROMPTS = ("the storm", "she read the letter", "a king\nthe train reached", "rain")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of an app with an SAE at each of two layers."""
    folder = tmp_path_factory.mktemp("server")
    model = tiny_llama(folder / "model", max_seq_len=256)
    saes = [tiny_sae(model, "layers.1.resid_post"), tiny_sae(model, "layers.0.resid_post", n_latents=40, seed=8)]
    runs = [write_features(folder / str(i), model, sae) for i, sae in enumerate(saes)]
    return [*flags_of(*runs), "--style", "plain"]


@pytest.fixture(scope="module")
def handlers(flags: list[str]) -> Handlers:
    return open_handlers(parse(AppConfig, "", flags), torch.device("cpu"))


@pytest.fixture(scope="module")
def address(handlers: Handlers) -> Iterator[str]:
    with served(handlers) as opened:
        yield opened


def test_the_page_begins_with_the_edits_of_steer(flags: list[str], address: str) -> None:
    def opened(steer: str) -> Handlers:
        return open_handlers(parse(AppConfig, "", [*flags, "--steer", steer]), torch.device("cpu"))

    assert address  # Gradio is imported as the app does it
    from inference.web.layout import Page

    handlers = opened("7:2.5:clamp:generated,20:ablate")
    slots, controls = handlers.start
    assert slots == (Feature("layers.1.resid_post", 7), Feature("layers.1.resid_post", 20), *NO_SLOTS[2:])
    assert list(controls[:2]) == [Controls(2.5, "clamp", "generated"), Controls(1.0, "ablate", "all")]
    props = {part["props"].get("elem_id"): part["props"] for part in Page(handlers).blocks.config["components"]}
    assert [props[f"edit-{i}"]["visible"] for i in range(3)] == [True, True, False]
    edits = Recipe.from_json(props["recipe"]["value"]).edits
    assert edits == (Edit(latent=7, strength=2.5, mode="clamp", positions="generated"), Edit(latent=20, mode="ablate"))
    with pytest.raises(ValueError, match=r"^--steer 7:99: .*30"):
        opened("7:99")


# Who reaches it


def test_others_are_let_in_only_with_a_password(tmp_path: Path) -> None:
    assert parse(AppConfig, "", []).host == "127.0.0.1"
    for flags in (["--host", "0.0.0.0"], ["--host", "example.org"], ["--public-link"]):
        with pytest.raises(ValueError, match="password-file"):
            parse(AppConfig, "", flags)
    secret = tmp_path / "password"
    secret.write_text("short\n")
    assert parse(AppConfig, "", ["--host", "0.0.0.0", "--password-file", str(secret)]).host == "0.0.0.0"
    with pytest.raises(ValueError, match="at least 8 characters"):
        read_password(secret)
    secret.write_text("long enough\n")
    assert read_password(secret) == "long enough"


def test_a_port_in_use_is_named(address: str, handlers: Handlers) -> None:
    port = httpx.URL(address).port
    assert port is not None
    with pytest.raises(ValueError, match=f"--port {port}: Address already in use; choose another"):
        serve(handlers, AppConfig(port=port))


def test_gradio_variables_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ALLOWED_PATHS": "/"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    ignore_gradio_variables()
    assert all(name.startswith("GRADIO_ANALYTICS_") for name in os.environ if name.startswith("GRADIO_"))
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_without_the_password_nothing_is_told(handlers: Handlers) -> None:
    with served(handlers, "correct horse") as address, httpx.Client(base_url=address) as http:
        assert "layers.1.resid_post" not in http.get("/").text
        for path in ("/config", "/gradio_api/queue/data?session_hash=x"):
            assert http.get(path).status_code == 401, path
        body = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert http.post("/gradio_api/queue/join", json=body).status_code == 401
        assert http.post("/login", data={"username": "workbench", "password": "battery staple"}).status_code == 400
        assert http.get("/config").status_code == 401
        assert http.post("/login", data={"username": "workbench", "password": "correct horse"}).status_code == 200
        assert "layers.1.resid_post" in http.get("/config").text


# What it serves


def test_no_file_but_its_own(address: str, tmp_path: Path) -> None:
    """Every way that Gradio has to hand out a file, for a secret beside the app, the app's own source, and the system's."""
    secret = Path.cwd() / "pyproject.toml"
    (tmp_path / "secret.txt").write_text("secret")
    wanted = ["/etc/passwd", str(secret), str(tmp_path / "secret.txt"), str(Path(__file__))]
    ways = [
        "/gradio_api/file={}", "/gradio_api/file/{}", "/file={}", "/file/{}", "/gradio_api/proxy=file://{}", "/static/{}",
        "/static/../../../../../../../..{}", "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{}", "/assets/{}",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{}", "/svelte/{}", "/custom_component/x/client/component/..%2f..{}",
        "/gradio_api/deep_link?session_hash={}", "/gradio_api/stream/{}/1/1/playlist-file", "/theme.css/..{}", "/{}",
        "/static/..\\..\\..{}", "/static/%00{}",
    ]  # fmt: skip
    with httpx.Client(base_url=address) as http:
        for way in ways:
            for path in wanted:
                answer = http.get(way.format(path))
                assert answer.status_code in (400, 403, 404), (way, path, answer.status_code)
        assert http.get("/gradio_api/file=http://127.0.0.1:9/x").status_code == 404
        assert http.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
        for path in (
            "/gradio_api/info",
            "/openapi.json",
            "/docs",
            "/gradio_api/run/find",
            "/gradio_api/call/find",
            "/monitoring",
        ):
            assert http.get(path).status_code == 404, path
        front = http.get("/")
        assert front.status_code == 200
        assert "default-src 'self'" in front.headers["content-security-policy"]


@pytest.mark.parametrize("length", [str(MAX_BODY_BYTES + 1), "-1", "many"])
def test_large_bodies_are_refused_unread(length: str) -> None:
    async def never(*_: Any) -> Any:
        raise AssertionError("the body was read")

    scope = {"type": "http", "path": "/gradio_api/queue/join", "headers": [(b"content-length", length.encode())]}
    assert completed(asked(Guard(never), scope, never))[0]["status"] == 413


def test_a_body_that_hides_its_length_is_cut_off() -> None:
    """A chunked body says no length; the server sees a connection that ended."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while seen[-1:] != ["http.disconnect"]:
            seen.append((await receive())["type"])

    async def endless() -> Any:
        return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

    completed(asked(Guard(app), {"type": "http", "path": "/gradio_api/queue/join", "headers": []}, endless))
    assert len(seen) == MAX_BODY_BYTES // 100_000 + 1


async def asked(guard: Guard, scope: Any, receive: Any) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await guard(scope, receive, send)
    return sent


def test_what_the_page_asks_for_is_known() -> None:
    for path in ("/", "/assets/index.js", "/static/js/x.js", "/gradio_api/heartbeat/abc", "/gradio_api/queue/join"):
        assert is_known(path)
    for path in ("/assets/../secret", "/static/..\\x", "/gradio_api/file=/etc/passwd", "/assets", "//"):
        assert not is_known(path)


# Many at once


class Case(NamedTuple):
    """One request with what it must give."""

    slots: Slots
    controls: tuple[Any, ...]
    prompts: str
    knobs: Knobs
    recipe: str
    columns: str


def cases(handlers: Handlers, n: int) -> list[Case]:
    """Mixed recipes over both sites, prompts and seeds, each answered alone."""
    draw = random.Random(0)
    known = [
        Feature(features.site, latent)
        for features in handlers.session.features
        for latent in range(features.n_latents)
        if float(features.max_values[latent]) > 0
    ]
    out = []
    for i in range(n):
        edits = draw.sample(known, draw.randint(0, 3))
        slots = (*edits, *NO_SLOTS[len(edits) :])
        rows = [
            Controls(draw.choice([-4.0, 0.5, 3.0, 12.0]), draw.choice(["add", "clamp", "ablate", "replace"]), "all")
            for _ in edits
        ]
        controls = tuple(value for row in [*rows, *[Controls()] * (N_SLOTS - len(rows))] for value in row)
        knobs = Knobs(max_new_tokens=NEW_TOKENS, temperature=draw.choice([0, 0.9]), top_k=draw.choice([0, 5]), seed=i)
        prompts = draw.choice(PROMPTS)
        *_, last = handlers.generate(prompts, knobs, slots, controls)
        lens = next(iter(edits), None)
        recipe = handlers.recipe(slots, controls).to_json()
        out.append(Case(slots, controls, prompts, knobs, recipe, handlers.shaded(last.ended(), lens)))
    return out


def user(address: str, number: int, mine: list[Case], start: threading.Barrier) -> int:
    """One page that asks for each of its cases in turn; returns how many answers were those of a lone run."""
    equal = 0
    with Client(address) as client:
        apply, generate = client.event("apply"), client.event("generate")
        finish = client.after(generate)
        start.wait(60)
        for case in mine:
            client.call(apply, [case.recipe])
            client.call(generate, [case.prompts, None, *case.knobs, *case.controls])
            (answer,) = client.call(finish, [None, None, None])
            equal += answer["data"][0] == case.columns
    return equal


def ask_at_once(address: str, known: list[Case], users: int, requests: int) -> int:
    """`users` new pages at once, `requests` each; returns how many answers were those of a lone run."""
    start = threading.Barrier(users)
    work = [[known[(7 * i + j) % len(known)] for j in range(requests)] for i in range(users)]
    with ThreadPoolExecutor(users) as pool:
        return sum(pool.map(lambda i: user(address, i, work[i], start), range(users)))


def load(handlers: Handlers, users: int, requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks every answer of that many users, and that nothing of them is left."""
    entered: list[int] = []
    left: list[int] = []
    adding = ActiveHooks.adding

    def counted(self: ActiveHooks, fns: Any) -> Any:
        stack = ExitStack()
        if fns:
            entered.append(1)
            stack.callback(left.append, 1)
        stack.enter_context(adding(self, fns))
        return stack

    known = cases(handlers, 40)
    with served(handlers) as address:
        monkeypatch.setattr(ActiveHooks, "adding", counted)
        assert ask_at_once(address, known, users, requests) == users * requests
    assert entered
    assert len(entered) == len(left), "hooks were left behind"
    assert not handlers.session.model._hooks.current().fns
    assert len(handlers.turns) == 0


def test_several_users_at_once(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    load(handlers, users=4, requests=4, monkeypatch=monkeypatch)


@pytest.mark.faults
def test_twenty_users_fifty_requests(handlers: Handlers, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and hooks in this process; memory of a server in its own, after a page that sent one request of each kind."""
    load(handlers, users=20, requests=10, monkeypatch=monkeypatch)
    known = cases(handlers, 40)
    with running_app(flags) as (address, pid):
        assert ask_at_once(address, known, users=1, requests=len(known)) == len(known)
        before = anonymous_bytes(pid)
        assert ask_at_once(address, known, users=20, requests=50) == 1000
        growth = anonymous_bytes(pid) - before
    print(f"the server grew by {growth / 2**20:.0f} MB")
    assert growth <= 50 * 2**20


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Held(Handlers):
    """Generations that end when they are stopped."""

    def generate(self, text: Any, knobs: Knobs, slots: Any, controls: Any) -> Any:
        *_, last = super().generate(text, knobs, slots, controls)

        def held() -> Iterator[Any]:
            while True:
                yield replace(last, running=True)
                time.sleep(0.01)

        return held()


def test_the_line_is_bounded(handlers: Handlers) -> None:
    """Two run and one waits; the fourth is refused in one line, and after a stop there is room again."""
    held = Held(handlers.session, "plain", turns=Turns(running=2, waiting=1))
    values = ["the storm", None, *Knobs(max_new_tokens=2), *UNUSED]
    with served(held) as address, ExitStack() as stack:
        clients = [stack.enter_context(Client(address)) for _ in range(4)]
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(client.call, client.event("generate"), values) for client in clients[:3]]
            while len(held.turns) < 3:
                time.sleep(0.01)
            refused = clients[3].call(clients[3].event("generate"), values)
            assert "busy: 1 requests wait already" in str(refused)
            for client in clients[:3]:
                held.turns.stop(client._session)
            assert all(future.result() for future in running)
        assert len(held.turns) == 0


def test_a_megabyte_is_refused(handlers: Handlers, address: str, record_property: Any) -> None:
    """At the door and by each handler. How long it takes is printed, as a busy machine proves nothing."""
    took = []
    with Client(address) as client:
        began = time.perf_counter()
        answer = client.join(client.event("generate"), ["x" * 2**20, None, *Knobs(), *UNUSED])
        took.append(time.perf_counter() - began)
        assert answer.status_code == 413
        assert "512 KB" in answer.text
        long = client.call(client.event("generate"), ["x" * 2**18, None, *Knobs(), *UNUSED])
        assert "8,000 characters together; found 262,144" in str(long)
    for text in ("x" * 2**20, "x\n" * 2**19):
        began = time.perf_counter()
        with pytest.raises(ValueError, match="8,000 characters"):
            list(handlers.generate(text, Knobs(), NO_SLOTS, UNUSED))
        took.append(time.perf_counter() - began)
    print(f"1 MB refused: over HTTP {1e3 * took[0]:.1f} ms, by the handler {1e3 * max(took[1:]):.2f} ms")
    record_property("refusal_ms", [round(1e3 * t, 2) for t in took])

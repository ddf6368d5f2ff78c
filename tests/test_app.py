"""The workbench: limits that hold whatever the client, what its pages say, and the real app in a real browser."""

import asyncio
import contextlib
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from core.cli import parse
from inference import views
from inference.app import MAX_BODY_BYTES, AppConfig, Guard, ignore_gradio_variables, read_password, serve
from inference.handlers import BY_LABEL, BY_TEXT, N_SLOTS, NO_SLOTS, Controls, Handlers
from inference.session import InferenceConfig, Session, open_session
from inference.steering import Edit, Recipe
from inference.turns import RUNNING
from inference.workbench import Knobs, Row, Snapshot, checked_request, compare, firing_on, neighbours, search, split_prompts
from llama3 import complete
from tests.browser import open_browser, running_app
from tests.tiny import tiny_llama
from tests.tiny_features import LABELS, Features, tiny_sae, write_features

QUIET = Knobs(max_new_tokens=8, temperature=0.9, seed=5)
UNUSED = tuple(Controls()) * N_SLOTS


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("app")
    model = tiny_llama(folder / "model", max_seq_len=1024)
    return write_features(folder, model, tiny_sae(model, "layers.1.resid_post"))


@pytest.fixture(scope="module")
def session(paths: Features) -> Session:
    return open_session(
        InferenceConfig(model=str(paths.model), sae=(paths.sae,), top=(paths.top,), explanations=(paths.explanations,)),
        torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def handlers(session: Session) -> Handlers:
    return Handlers(session, "plain")


def controls(*rows: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """What the page sends for its edit rows."""
    return tuple(value for row in (*rows, *[tuple(Controls())] * (N_SLOTS - len(rows))) for value in row)


def slots(*latents: int) -> tuple[int | None, ...]:
    return (*latents, *[None] * (N_SLOTS - len(latents)))


# Limits


def test_a_megabyte_is_refused_at_once(handlers: Handlers) -> None:
    began = time.perf_counter()
    for text in ("x" * 2**20, "x\n" * 2**19):
        with pytest.raises(ValueError, match="8,000 characters"):
            list(handlers.generate(text, QUIET, NO_SLOTS, UNUSED))
        assert "300 characters" in handlers.find(BY_LABEL, text)
        assert "8,000 characters" in handlers.find(BY_TEXT, text)
        with pytest.raises(ValueError, match="64,000 characters"):
            handlers.applied(text)
        with pytest.raises(ValueError, match="8,000 characters"):
            list(handlers.chat([("user", text)], "", QUIET, NO_SLOTS, UNUSED))
    assert (time.perf_counter() - began) / 10 < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "new tokens must be a number from 1 to 512"),
        ({"max_new_tokens": 10**9}, "new tokens must be a number from 1 to 512"),
        ({"max_new_tokens": 2.5}, "whole number"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": -math.inf}, "top-p must be a number"),
        ({"repetition_penalty": None}, "repetition penalty must be a number"),
        ({"seed": True}, "seed must be a number"),
        ({"seed": 1e300}, "seed must be a number"),
    ],
)
def test_sampling_is_limited(handlers: Handlers, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(handlers.generate("the storm", replace(QUIET, **change), NO_SLOTS, UNUSED))


@pytest.mark.parametrize(
    ("latent", "row", "message"),
    [
        (48, (4, "add", "all"), "latents 0 to 47"),
        (-1, (4, "add", "all"), "latents 0 to 47"),
        (1e300, (4, "add", "all"), "out of range"),
        ("x", (4, "add", "all"), "whole number from 0"),
        (math.nan, (4, "add", "all"), "whole number from 0"),
        (3, (31, "add", "all"), "from -10 to 30"),
        (3, (math.nan, "add", "all"), "from -10 to 30"),
        (3, (1e38, "add", "all"), "from -10 to 30"),
        (3, (None, "add", "all"), "from -10 to 30"),
        (3, (4, "explode", "all"), "unknown mode"),
        (3, (4, ["add"], "all"), "unknown mode"),
        (3, (4, "add", "somewhere"), "positions must be"),
        (3, (4, "add", {"a": 1}), "positions must be"),
        (3, (4, "add", 10**30), "positions must be"),
    ],
)
def test_edits_are_limited(handlers: Handlers, latent: Any, row: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(handlers.generate("the storm", QUIET, slots(latent), controls(row)))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the prompt is empty"), (" \n\t\n", "the prompt is empty"), ("a\n" * 9, "at most 8 prompts"), (7, "must be text"),
     ("word " * 400, "context holds 1,024")],
)  # fmt: skip
def test_prompts_are_limited(handlers: Handlers, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(handlers.generate(text, QUIET, NO_SLOTS, UNUSED))


def test_prompts_are_lines() -> None:
    assert split_prompts("  one \n\n two\r\nthree") == ["one", "two", "three"]


# Generation


def run(handlers: Handlers, prompts: str, slot: tuple[int | None, ...] = NO_SLOTS, row: tuple[Any, ...] = UNUSED) -> Snapshot:
    *_, last = handlers.generate(prompts, QUIET, slot, row)
    return last


def test_columns_are_what_lone_runs_give(handlers: Handlers, session: Session) -> None:
    """Each column equals the plain `complete`, with and without the recipe's hooks."""
    prompts = ["the storm", "she read the letter"]
    last = run(handlers, "\n".join(prompts), slots(3, 7), controls((9, "add", "all"), (2.5, "clamp", "from 4")))
    sampling = QUIET.checked()
    assert [row.text for row in last.baseline] == complete(session.model, session.tokenizer, prompts, sampling)
    steering = session.needs_features().steering
    recipe = Recipe(
        (Edit(latent=3, strength=9.0), Edit(latent=7, strength=2.5, mode="clamp", positions=4)), steering.sae.weights_hash
    )
    hooks = steering.hooks_for([recipe] * 2, [row.prompt_length for row in last.baseline])
    assert last.steered is not None
    assert [row.text for row in last.steered] == complete(session.model, session.tokenizer, prompts, sampling, hooks)
    assert [row.text for row in last.steered] != [row.text for row in last.baseline]
    assert not last.running
    assert all(row.finished for row in (*last.baseline, *last.steered))


def test_no_edits_no_second_column(handlers: Handlers) -> None:
    assert run(handlers, "the storm").steered is None
    still = run(handlers, "the storm", slots(3), controls((0, "add", "all")))
    assert still.steered is None
    assert "No edit changes anything" in views.columns(handlers.session, still, None)


def test_the_context_bounds_the_answer(session: Session) -> None:
    request = checked_request(session, "a b c d " * 140, Recipe(), Knobs(max_new_tokens=500))
    assert request.rows[0].prompt_length + request.sampling.max_new_tokens == session.context
    *_, last = compare(session, request)
    assert last.baseline[0].finished in ("length", "stop")


def test_stopping_ends_the_work(handlers: Handlers) -> None:
    stream = handlers.generate("the storm", replace(QUIET, max_new_tokens=100), NO_SLOTS, UNUSED)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert first.running
    assert first.new_tokens == 1
    assert not handlers.session.model._hooks.current().fns


def test_chat_hears_the_recipe(handlers: Handlers) -> None:
    def answer(slot: tuple[int | None, ...], row: tuple[Any, ...]) -> str:
        *_, (text, dropped) = handlers.chat([("user", "hello")], "Be kind.", QUIET, slot, row)
        assert dropped == 0
        return text

    assert answer(NO_SLOTS, UNUSED) != answer(slots(3), controls((12, "add", "all")))
    assert answer(NO_SLOTS, UNUSED) == answer(NO_SLOTS, UNUSED)


# Finding and reading


def test_search_ranks_titles_first(session: Session) -> None:
    features = session.needs_features()
    hits = search(features, "storm")
    assert hits
    assert all("storm" in hit.label for hit in hits)
    assert search(features, "STORMS sea")[0].label == "storms at sea"
    assert [hit.latent for hit in search(features, "#7")] == [7]
    assert search(features, "zebra") == []
    ranked = search(features, "")
    assert [hit.value for hit in ranked] == sorted((hit.value for hit in ranked), reverse=True)


def test_firing_features_against_the_plain_sum(session: Session) -> None:
    features = session.needs_features()
    text = "the storm tore the roof"
    ids = session.tokenizer.encode(text, bos=True)
    x = session.model.capture(torch.tensor([ids]), sites=[features.site])[features.site][0]
    share = torch.zeros(features.n_latents)
    for row in x[1:]:
        found = features.sae.encode(row[None])
        for value, latent in zip(found.values[0], found.indices[0], strict=True):
            if value > 0:
                share[latent] += (value / features.max_values[latent]).clamp(max=1)
    hits = firing_on(session, text)
    assert [hit.latent for hit in hits[:5]] == share.argsort(descending=True)[:5].tolist()
    assert all(hit.token in text for hit in hits)


def test_neighbours_are_by_cosine(session: Session) -> None:
    features = session.needs_features()
    rows = torch.nn.functional.normalize(features.sae.W_dec, dim=1)
    cosine = rows @ rows[5]
    cosine[5] = -2
    assert [hit.latent for hit in neighbours(features, 5, 4)] == cosine.topk(4).indices.tolist()


def test_card_says_what_is_known(handlers: Handlers, session: Session) -> None:
    features = session.needs_features()
    shown = handlers.open("#3", None)
    assert shown.lens == 3
    best = features.top.sentences(3, n=1)[0]
    assert LABELS[3] in shown.card
    assert f"<b>{best.value:.3g}</b>" in shown.card
    assert f'data-open="{neighbours(features, 3, 1)[0].latent}"' in shown.card
    with pytest.raises(ValueError, match="latents 0 to 47"):
        handlers.open(48, None)


def test_text_of_others_is_escaped(session: Session) -> None:
    evil = '<img src="http://x" onerror=alert(1)>'
    row = Row(evil, tuple(session.tokenizer.encode(evil, bos=True)), 4, text=evil)
    values = [1.0] * (len(row.ids) - 1)
    snapshot = Snapshot((row,), (row,))
    pages = [
        views.columns(session, snapshot, None), views.columns(session, snapshot, 3, [values, values]), views.note(evil),
        views.transcript([("user", evil)]), views.status(evil), views.tokens([evil], [1.0], 1.0), views.examples([evil]),
    ]  # fmt: skip
    for page in pages:
        assert "<img" not in page
        assert "&lt;" in page


def test_shading_follows_the_values(session: Session) -> None:
    html = views.tokens(["a", "b", "c"], [0.0, 1.0, 4.0], 2.0)
    assert html.startswith('a<span class="tok" style="--v:0.500"')
    assert "--v:1.000" in html


# Recipes on the page


def test_recipes_go_to_the_page_and_back(handlers: Handlers) -> None:
    chosen, row = slots(3, 7), controls((-4.5, "clamp", "generated"), (12, "add", "from 9"))
    recipe = handlers.recipe(chosen, row)
    assert recipe.edits[1].positions == 9
    back, values = handlers.applied(recipe.to_json())
    assert back == chosen
    assert handlers.recipe(back, [value for one in values for value in one]) == recipe
    foreign = Recipe((Edit(latent=3),), "another").to_json()
    for text, message in (
        (foreign, "'another'"),
        ("", "no recipe"),
        (recipe.to_json().replace("-4.5", "-11"), "from -10 to 30"),
    ):
        with pytest.raises(ValueError, match=message):
            handlers.applied(text)


def test_edits_fill_free_rows(handlers: Handlers) -> None:
    chosen = NO_SLOTS
    for latent in range(N_SLOTS):
        chosen, row = handlers.add(latent, chosen)
        assert row == latent
    assert handlers.add(2, chosen) == (chosen, 2)
    features = handlers.features
    largest, row_norm = float(features.max_values[3]), features.sae.cfg.d_model**0.5
    assert handlers.fresh(3).strength * largest == pytest.approx(0.4 * row_norm, abs=0.125 * largest)
    with pytest.raises(ValueError, match="all 6 edits are in use"):
        handlers.add(40, chosen)


# The server


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


def test_gradio_variables_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ALLOWED_PATHS": "/"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    ignore_gradio_variables()
    assert [name for name in os.environ if name.startswith("GRADIO_")] == ["GRADIO_ANALYTICS_ENABLED"]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@pytest.mark.parametrize("length", [str(MAX_BODY_BYTES + 1), "-1", "many"])
def test_large_bodies_are_refused_unread(length: str) -> None:
    sent: list[Any] = []

    async def never(*_: Any) -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"content-length", length.encode())]}
    asyncio.run(Guard(never)(scope, never, send))
    assert sent[0]["status"] == 413


# A real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


def test_the_app_in_a_browser(browser: Browser, paths: Features, tmp_path: Path) -> None:
    """Search a feature, steer with it, see both columns differ, read its card, chat two turns, stop, share, on a phone too."""
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    exposed = {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ANALYTICS_ENABLED": "True"}
    with running_app(paths.flags, exposed) as address:
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        asked: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{address}/?latent=5")
        expect(page.locator("#card h2")).to_have_text(LABELS[5])
        _steer(page, shots)
        _open_neighbour(page)
        _recipe(page)
        _chat_two_turns(page, shots)
        _stop(page)
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the page is wider than a phone"
        page.locator(".theme").click()
        page.screenshot(path=shots / "app-phone-dark.png", full_page=True)
        elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:", address.replace("http", "ws")))]
        assert elsewhere == []
        assert problems == []
        assert page.request.get(f"{address}/gradio_api/file=/etc/passwd").status in (403, 404)
        assert "default-src 'self'" in page.request.get(address).headers["content-security-policy"]


class Endless(Handlers):
    """Generations that end only when they are stopped."""

    def generate(self, text: Any, knobs: Knobs, slots: Any, controls: Any) -> Iterator[Snapshot]:
        request = checked_request(self.session, text, Recipe(), knobs)
        return (Snapshot(request.rows, None, new_tokens=i) for i in ticks())

    def chat(self, messages: Any, system: Any, knobs: Knobs, slots: Any, controls: Any) -> Iterator[tuple[str, int]]:
        return ((f"word {i}", 0) for i in ticks())


def ticks() -> Iterator[int]:
    for i in itertools.count():
        yield i
        time.sleep(0.02)


@contextlib.contextmanager
def endless_app(session: Session) -> Iterator[tuple[str, Handlers]]:
    handlers = Endless(session, "plain")
    blocks, address = serve(handlers, AppConfig(port=0))
    try:
        yield address, handlers
    finally:
        blocks.close(verbose=False)


@pytest.mark.filterwarnings("ignore")  # Gradio's server runs in this process, and uses what pandas has deprecated
def test_one_press_stops(browser: Browser, session: Session) -> None:
    """While it runs, while it waits, in both tabs; and a page that is closed stops all that it began."""
    with endless_app(session) as (address, handlers), contextlib.ExitStack() as stack:
        pages = [stack.enter_context(contextlib.closing(browser.new_page())) for _ in range(RUNNING + 1)]
        for page in pages:
            page.goto(address)
            page.locator("#generate").click()
            expect(page.locator("#status")).to_contain_text("Writing…" if page is not pages[-1] else "Waiting for 1")
        first, second, third = pages
        press_once(third, "#stop")
        expect(third.locator("#status")).to_contain_text("Stopped.")
        press_once(first, "#stop")
        expect(first.locator("#status")).to_contain_text(re.compile(r"Stopped\. \d+ tokens"))
        first.locator("#generate").click()
        expect(first.locator("#status")).to_contain_text("Writing…")
        for page in (first, second):
            page.close()
        wait_until(lambda: len(handlers.turns) == 0)
        _stop_a_chat(third)
        assert len(handlers.turns) == 0


def _stop_a_chat(page: Page) -> None:
    page.get_by_role("tab", name="Chat").click()
    answers = page.locator("#transcript .turn.assistant")
    for button, before, after, said in (("#chat-stop", 1, 1, "Stopped."), ("#new-chat", 2, 0, "")):
        page.locator("#message textarea").fill("hello")
        page.locator("#send").click()
        expect(answers).to_have_count(before)
        expect(answers.last).to_contain_text("word")
        expect(page.locator("#chat-stop")).to_be_enabled()
        press_once(page, button)
        expect(page.locator("#send")).to_be_enabled()
        expect(answers).to_have_count(after)
        expect(page.locator("#chat-status")).to_contain_text(said)


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def _steer(page: Page, shots: Path) -> None:
    page.locator("#query textarea").fill("storms")
    hit = page.locator("#results .hits li").first
    expect(hit).to_contain_text("storms at sea")
    hit.locator("[data-steer]").click()
    strength = page.locator("#edit-0 input[type=number]")
    strength.fill("12")
    strength.press("Tab")
    page.locator("#generate").click()
    done = page.locator("#columns .sides:not([aria-busy]) .steered .new")
    expect(done).not_to_be_empty()
    expect(page.locator("#legend")).to_contain_text("read on the unsteered model")
    assert done.inner_text() != page.locator("#columns .baseline .new").inner_text()
    page.screenshot(path=shots / "app-desktop.png")


def _open_neighbour(page: Page) -> None:
    neighbour = page.locator("#card .near .hit").first
    wanted = neighbour.get_attribute("data-open")
    neighbour.click()
    expect(page.locator(f'#card .card[data-latent="{wanted}"]')).to_be_visible()
    assert f"latent={wanted}" in page.url


def _recipe(page: Page) -> None:
    page.get_by_role("tab", name="Recipe").click()
    expect(page.locator("#recipe textarea")).to_have_value(re.compile('"strength": 12'))
    page.wait_for_timeout(300)  # no hand is faster; Gradio drops what is typed while the tab is still being built
    page.locator("#recipe textarea").fill("{}")
    page.locator("#apply").click()
    expect(page.locator("#recipe-status")).to_contain_text("not a steering recipe")


def _chat_two_turns(page: Page, shots: Path) -> None:
    page.get_by_role("tab", name="Chat").click()
    for turn in (1, 2):
        page.locator("#message textarea").fill(f"message {turn}")
        page.locator("#send").click()
        expect(page.locator("#transcript .turn.user")).to_have_count(turn)
        expect(page.locator("#transcript .turn.assistant")).to_have_count(turn)
        expect(page.locator("#send")).to_be_enabled()
    page.screenshot(path=shots / "app-chat.png")


def press_once(page: Page, button: str) -> None:
    """A click as soon as the button takes one; from within the page, as the way through the driver can outlast a generation."""
    press = "(button) => { const b = document.querySelector(button); if (b.disabled) return false; b.click(); return true; }"
    page.wait_for_function(press, arg=button, polling=10)


def _stop(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.locator("#prompts textarea").fill("\n".join(f"the storm {i}" for i in range(8)))
    page.locator(".sampling button").first.click()
    tokens = page.locator("#new-tokens input[type=number]")
    tokens.fill("500")
    tokens.press("Tab")
    page.locator("#generate").click()
    press_once(page, "#stop")
    expect(page.locator("#status")).to_contain_text("Stopped.")
    expect(page.locator("#generate")).to_be_enabled()

"""The real app in a real browser: what a person does with it, with the mouse and with the keys, and how a press stops it."""

import contextlib
import itertools
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from playwright.sync_api import Browser, Locator, Page, expect

from core.cli import parse
from inference.app import AppConfig, open_handlers
from inference.steering import Recipe
from inference.web.handlers import N_SLOTS, NO_SLOTS, Controls, Handlers
from inference.web.queue import RUNNING
from inference.web.validation import MAX_NEW_TOKENS, Knobs
from inference.web.workbench import Snapshot, checked_request
from tests.app_client import served
from tests.browser import open_browser, press_once, running_app
from tests.tiny import tiny_llama
from tests.tiny_features import LABELS, Features, flags_of, tiny_sae, write_features

pytestmark = pytest.mark.filterwarnings("ignore")  # Gradio's server runs in this process, and uses what pandas has deprecated

HOSTILE = "{{value}} ${document.title} <b>bold</b> {{#each x}}"
"""What a template, or a page, would take for its own."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("app")
    model = tiny_llama(folder / "model", max_seq_len=1024)
    return write_features(folder, model, tiny_sae(model, "layers.1.resid_post"))


@pytest.fixture(scope="module")
def earlier(paths: Features, tmp_path_factory: pytest.TempPathFactory) -> Features:
    """A second SAE of that model, at the layer before."""
    return write_features(tmp_path_factory.mktemp("earlier"), paths.model, tiny_sae(paths.model, "layers.0.resid_post", seed=8))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)
    with open_browser() as opened:
        yield opened


@contextlib.contextmanager
def opened_page(browser: Browser, address: str) -> Iterator[Page]:
    with contextlib.closing(browser.new_page(viewport={"width": 1440, "height": 1000})) as page:
        page.set_default_timeout(30_000)
        page.goto(address)
        yield page


# A visit


def test_the_app_in_a_browser(browser: Browser, paths: Features) -> None:
    """Search a feature, steer with it, see both columns differ, read its card, chat two turns, on a phone too."""
    exposed = {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ANALYTICS_ENABLED": "True"}
    asked: list[str] = []
    problems: list[str] = []
    with running_app(paths.flags, exposed) as (address, _):
        assert not is_open("127.0.0.2", urlparse(address).port), "it listens on more than 127.0.0.1"
        with opened_page(browser, f"{address}/?latent=5") as page:
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: problems.append(str(error)))
            expect(page.locator("#card h2")).to_have_text(LABELS[5])
            expect(page.locator("#site")).to_have_count(0)
            _steer(page)
            _sample(page)
            _open_neighbour(page)
            _recipe(page)
            _chat_two_turns(page)
            _bad_input(page)
            page.set_viewport_size({"width": 390, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the page is wider than a phone"
            page.evaluate("scrollTo(0, 0)")
            tops = "['.masthead', '.search'].map((part) => document.querySelector(part).getBoundingClientRect())"
            assert page.evaluate(f"(([head, search]) => head.bottom <= search.top)({tops})"), "the masthead hides the search"
            page.locator(".theme").click()
            assert page.evaluate("document.body.classList.contains('dark')")
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:", address.replace("http", "ws")))] == []
    assert problems == []


def is_open(host: str, port: int | None) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _steer(page: Page) -> None:
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


def _sample(page: Page) -> None:
    """What is typed in the very moment in which the knobs are shown stays, and reaches the model."""
    knobs, number = page.locator("#sampling"), page.locator("#new-tokens input[type=number]")
    expect(knobs).to_be_hidden()
    page.evaluate("""() => {
        document.querySelector('#sampling-fold button').click();
        const number = document.querySelector('#new-tokens input[type=number]');
        number.value = '3';
        number.dispatchEvent(new Event('input', {bubbles: true}));
    }""")
    expect(knobs).to_be_visible()
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"(?<!\d)[2-6] tokens"))
    expect(page.locator("#generate")).to_be_enabled()
    expect(number).to_have_value("3")
    page.locator("#sampling-fold button").click()
    expect(knobs).to_be_hidden()


def _open_neighbour(page: Page) -> None:
    neighbour = page.locator("#card .near .hit").first
    wanted = neighbour.get_attribute("data-open")
    neighbour.click()
    expect(page.locator(f'#card .card[data-latent="{wanted}"]')).to_be_visible()
    assert f"latent={wanted}" in page.url


def _recipe(page: Page) -> None:
    """What is typed as soon as the tab is open stays, and another SAE's recipe is refused in one line."""
    written = page.locator("#recipe textarea")
    page.get_by_role("tab", name="Recipe").click()
    written.fill("{}", timeout=1000)
    page.locator("#apply").click()
    expect(page.locator("#recipe-status")).to_contain_text("not a steering recipe")
    expect(written).to_have_value("{}")
    strength = page.locator("#edit-0 input[type=number]")
    strength.fill("11")
    strength.press("Tab")
    expect(written).to_have_value(re.compile('"strength": 11'))
    written.fill(re.sub('"sae_hash": "[^"]*"', '"sae_hash": "other"', written.input_value()))
    page.locator("#apply").click()
    expect(page.locator("#recipe-status")).to_contain_text("the recipe belongs to the SAE 'other'")


def _chat_two_turns(page: Page) -> None:
    page.get_by_role("tab", name="Chat").click()
    for turn, message in enumerate(("hello", HOSTILE), 1):
        page.locator("#message textarea").fill(message)
        page.locator("#send").click()
        expect(page.locator("#transcript .turn.user")).to_have_count(turn)
        expect(page.locator("#transcript .turn.user").last).to_have_text(message)
        expect(page.locator("#transcript .turn.assistant")).to_have_count(turn)
        expect(page.locator("#send")).to_be_enabled()


def _bad_input(page: Page) -> None:
    """One line each, where the eye is, and the page goes on working."""
    page.get_by_role("tab", name="Compare").click()
    for prompt, said in (
        ("", "the prompt is empty"),
        ("word " * 400, "the context holds 1,024"),
        ("a\n" * 9, "at most 8 prompts"),
    ):
        page.locator("#prompts textarea").fill(prompt)
        page.locator("#generate").click()
        expect(page.locator("#status .error")).to_contain_text(said)
        expect(page.locator("#generate")).to_be_enabled()
    page.locator("#query textarea").fill("4800")
    expect(page.locator("#results")).to_contain_text(
        "latent 4800 is out of range; the SAE at layers.1.resid_post has latents 0 to 47"
    )
    for query in ("zebra", "zebras"):  # the same answer twice: the list must not go on looking as if it were being replaced
        page.locator("#query textarea").fill(query)
        expect(page.locator("#results")).to_contain_text("Nothing found")
        expect(page.locator("#results")).not_to_have_class(re.compile("loading"))


def test_two_sites_in_a_browser(browser: Browser, paths: Features, earlier: Features) -> None:
    """Find, open and steer with features of the second SAE beside one of the first; the link leads back to it."""
    with running_app(flags_of(paths, earlier)) as (address, _):
        with opened_page(browser, f"{address}/?latent=5") as page:
            expect(page.locator("#card h2")).to_contain_text("layers.1.resid_post")
            page.locator("#site input").click()
            page.get_by_role("option", name="layers.0.resid_post").click()
            hit = page.locator('#results .hit[data-site="layers.0.resid_post"]').first
            hit.click()
            latent = hit.get_attribute("data-open")
            shown = f'#card .card[data-latent="{latent}"][data-site="layers.0.resid_post"]'
            expect(page.locator(f"{shown} .where")).to_have_text("layers.0.resid_post")
            expect(page.locator("#results .hit.current")).to_have_count(1)
            link = page.url
            assert f"latent={latent}&site=layers.0.resid_post" in link
            page.locator("#card .steer").click()
            expect(page.locator("#edit-0 .where")).to_have_text("layers.0.resid_post")
            page.locator("#site input").focus()
            for key in ("ArrowUp", "Enter"):
                page.keyboard.press(key)
            expect(page.locator("#results .hit[data-site]")).to_have_count(0)
            page.locator("#results .plus").first.click()
            expect(page.locator("#edit-1 .where")).to_have_text("layers.1.resid_post")
            page.locator("#generate").click()
            expect(page.locator("#legend .where")).to_have_text("layers.0.resid_post")
            page.get_by_role("tab", name="Recipe").click()
            expect(page.locator("#recipe textarea")).to_have_value(re.compile("steering-recipe/2"))
            page.locator("#edit-1 .hit").click()
            expect(page.locator("#card h2 .where")).to_have_text("layers.1.resid_post")
            assert "site=" not in page.url
        with opened_page(browser, link) as page:
            expect(page.locator(shown)).to_be_visible()
            expect(page.locator("#site input")).to_have_value("layers.0.resid_post")
            expect(page.locator("#results .hit").first).to_have_attribute("data-site", "layers.0.resid_post")
            page.set_viewport_size({"width": 390, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the page is wider than a phone"


# Keys


def test_without_a_mouse(browser: Browser, paths: Features) -> None:
    """Search, go down the list, open, steer, generate, read what the keys are, and go to the next tab."""
    with served(handlers_of(paths)) as address, opened_page(browser, address) as page:
        query = page.locator("#query textarea")
        expect(page.locator("#results .hit").first).to_be_visible()
        wait_until(lambda: focused_by(page, "/", query))  # keys are heard a moment after the page is seen
        page.keyboard.type("storms")
        expect(page.locator("#results .hit").first).to_contain_text("storms at sea")
        page.keyboard.press("Enter")
        expect(page.locator("#card h2")).to_have_text("storms at sea")
        page.keyboard.press("ArrowDown")
        expect(page.locator("#results .hit").first).to_be_focused()
        page.keyboard.press("+")
        expect(page.locator("#edit-0")).to_be_visible()
        page.keyboard.press("ArrowDown")
        expect(page.locator("#results .hit").nth(1)).to_be_focused()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('#results')") is None, "the list is one stop of the Tab key"
        page.keyboard.press("Shift+Tab")
        expect(page.locator("#results .hit").nth(1)).to_be_focused()
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowUp")
        expect(query).to_be_focused()
        page.keyboard.press("Control+Enter")
        expect(page.locator("#columns .sides:not([aria-busy]) .steered .new")).not_to_be_empty()
        expect(page.locator("#generate")).to_be_enabled()
        page.locator("#generate").focus()
        page.keyboard.press("?")
        expect(page.locator(".keys dl")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator(".keys dl")).to_be_hidden()
        page.get_by_role("tab", name="Compare").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#message textarea")).to_be_visible()
        expect(page.locator("#prompts textarea")).to_be_hidden()


def focused_by(page: Page, key: str, part: Locator) -> bool:
    page.keyboard.press(key)
    return bool(part.evaluate("(part) => part === document.activeElement"))


# Stopping

STOP_WHEN_WRITTEN = """() => new Promise((resolve) => {
    document.querySelector('#generate').click();
    const look = setInterval(() => {
        const stop = document.querySelector('#stop');
        if (stop.disabled || !document.querySelector('#columns [aria-busy] .steered .new:not(:empty)')) return;
        clearInterval(look);
        stop.click();
        resolve();
    }, 1);
})"""
"""Starts a generation, and stops it as soon as its first steered token is in sight."""


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


def handlers_of(paths: Features) -> Handlers:
    return open_handlers(parse(AppConfig, "", [*paths.flags, "--style", "plain"]), torch.device("cpu"))


def test_one_press_stops(browser: Browser, paths: Features) -> None:
    """While it runs, while it waits, in both tabs; and a page that is closed stops all that it began."""
    handlers = Endless(handlers_of(paths).session, "plain")
    with served(handlers) as address, contextlib.ExitStack() as stack:
        pages = [stack.enter_context(opened_page(browser, address)) for _ in range(RUNNING + 1)]
        for page in pages:
            page.locator("#generate").click()
            expect(page.locator("#status")).to_contain_text("Writing…" if page is not pages[-1] else "Waiting for 1")
        first, second, third = pages
        press_once(third, "#stop")
        expect(third.locator("#status")).to_contain_text("Stopped.")
        first.keyboard.press("Escape")
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
    # At once: two frames after Send, "New chat" either cannot be pressed yet or finds a message that the server knows.
    page.locator("#message textarea").fill("hello")
    page.evaluate("""() => new Promise((resolve) => {
        document.querySelector('#send').click();
        requestAnimationFrame(() => requestAnimationFrame(() => resolve()));
    })""")
    press_once(page, "#new-chat")
    expect(page.locator("#send")).to_be_enabled()
    expect(answers).to_have_count(0)


def test_one_press_stops_the_embedded_model(browser: Browser) -> None:
    """A real generation, steered, of eight prompts to the end of the context: it ends early, with texts that it had begun."""
    handlers = open_handlers(parse(AppConfig, "", []), torch.device("cpu"))
    feature = handlers.starters[0].feature
    slots, row = handlers.add(feature.latent, feature.site, NO_SLOTS)
    values = [value for i in range(N_SLOTS) for value in (handlers.fresh(feature) if i == row else Controls())]
    prompts = "\n".join(f"{opening} the" for opening in ("In", "On", "At", "Of", "By", "To", "As", "So"))
    *_, whole = handlers.generate(prompts, Knobs(max_new_tokens=MAX_NEW_TOKENS), slots, values)
    assert whole.new_tokens > 1000
    with served(handlers) as address, opened_page(browser, address) as page:
        page.locator(f'#hint [data-steer="{feature.latent}"]').click()
        expect(page.locator("#edit-0")).to_be_visible()
        page.locator("#prompts textarea").fill(prompts)
        page.locator("#sampling-fold button").click()
        page.locator("#new-tokens input[type=number]").fill(str(MAX_NEW_TOKENS))
        page.locator("#new-tokens input[type=number]").press("Tab")
        page.evaluate(STOP_WHEN_WRITTEN)
        expect(page.locator("#status")).to_contain_text(re.compile(r"Stopped\. \d+ tokens"))
        expect(page.locator("#generate")).to_be_enabled()
        found = re.search(r"(\d+) tokens", page.locator("#status").inner_text())
        assert found is not None
        assert 0 < int(found[1]) < whole.new_tokens
        for side, rows in (("baseline", whole.baseline), ("steered", whole.steered or ())):
            texts = page.locator(f"#columns .{side} .text").evaluate_all("(all) => all.map((one) => one.textContent)")
            assert len(texts) == 8
            assert all(f"{row.prompt}{row.text}".startswith(text) for row, text in zip(rows, texts, strict=True))
        wait_until(lambda: len(handlers.turns) == 0)
        assert not handlers.session.model._hooks.current().fns


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)

"""The report in a real browser, opened from the disk: links, keys, search, phones, missing files, and no request elsewhere."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from interpretability import report
from interpretability.report import REPORT_FILE
from tests.browser import open_browser
from tests.test_report import DEAD, HOSTILE, folders, make_report, with_all  # noqa: F401

WAIT_S = 10
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


def until(page: Page, expression: str) -> None:
    """Wait until it holds. Playwright's own wait evaluates text inside the page, which the page's policy forbids."""
    deadline = time.monotonic() + WAIT_S
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"after {WAIT_S} s not yet: {expression}"
        page.wait_for_timeout(20)


class Visit:
    """A page with all that it said and asked for."""

    def __init__(self, browser: Browser, **how: Any) -> None:
        self.page: Page = browser.new_page(**how)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, folder: Path, anchor: str = "") -> Page:
        self.page.goto((folder / REPORT_FILE).as_uri() + anchor)
        return self.page

    def shown(self) -> str:
        """The text of the open feature, once it is drawn."""
        self.page.wait_for_selector("#dialog-body .halves")
        return self.page.inner_text("#dialog-body")


def rows(page: Page) -> list[str]:
    return page.locator("#rows td.label").all_inner_texts()


def test_keys_search_and_deep_links(folders: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(report, "BLOCK", 5)
    make_report(folders, **with_all(folders))
    visit = Visit(browser)
    page = visit.open(folders / "report", "#latent=7")
    text = visit.shown()
    assert "title of 7 é<b>" in text
    assert HOSTILE in text
    assert page.locator("#dialog-body mark").count() >= 7
    page.keyboard.press("j")
    until(page, "location.hash === '#latent=8' && $('dialog-number').textContent === 'Feature 8'")
    page.keyboard.press("ArrowLeft")
    until(page, "location.hash === '#latent=7' && $('dialog-number').textContent === 'Feature 7'")
    page.keyboard.press("Escape")
    until(page, "!document.querySelector('dialog').open && location.hash === ''")
    page.keyboard.press("/")
    page.keyboard.type("alert")  # in explanations and promoted tokens, not in labels
    until(page, "document.querySelectorAll('#rows a').length === 12")
    page.fill("#query", "TITLE 3")
    until(page, "document.querySelectorAll('#rows a').length === 1")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert "title of 3" in visit.shown()
    page.keyboard.press("Escape")
    page.fill("#query", "zebra")
    assert page.inner_text("#rows") == "No feature matches."
    page.fill("#query", "1")
    assert rows(page)[0] == "title of 1 é<b>", "the latent of that number comes first"
    page.fill("#query", "")
    page.locator("#query").blur()
    for key in "jjk":
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.hash") == "#latent=0"
    page.goto(page.url.split("#")[0] + f"#latent={DEAD}")
    assert "fires on no token" in visit.shown()
    assert visit.said == []
    assert visit.asked
    assert all(url.startswith(folders.as_uri()) for url in visit.asked)


def test_phone_dark_and_the_button(folders: Path, browser: Browser) -> None:  # noqa: F811
    make_report(folders, **with_all(folders))
    visit = Visit(browser, color_scheme="dark", **PHONE)
    page = visit.open(folders / "report")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    dark = page.evaluate(background)
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate(background) != dark
    page.reload()
    assert page.evaluate(background) != dark, "the choice is remembered"
    page.locator("#rows a").first.click()
    visit.shown()
    assert page.evaluate("document.getElementById('dialog-body').scrollWidth") <= 360
    assert visit.said == []


def test_a_page_without_its_folder_says_so_and_one_file_needs_none(folders: Path, browser: Browser) -> None:  # noqa: F811
    make_report(folders, **with_all(folders))
    (folders / "report" / "features" / "00000.js").unlink()
    page = Visit(browser).open(folders / "report", "#latent=2")
    until(page, "document.getElementById('dialog-body').innerText.includes('features/00000.js is missing')")
    make_report(folders, "one", one_file=True)
    visit = Visit(browser)
    visit.open(folders / "one", "#latent=2")
    assert "title of 2" in visit.shown()
    assert len(visit.asked) == 1

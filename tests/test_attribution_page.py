"""The page of an attribution in a real browser, opened from the disk: tokens, table, evidence, hostile text, phones."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from interpretability import attribute as stage
from interpretability.causal.records import read_attribution
from tests.browser import open_browser
from tests.interp_folders import solo
from tests.test_attribution import config
from tests.tiny import tiny_llama
from tests.tiny_features import Features, tiny_sae, write_features

HOSTILE = "</script><script>alert(1)</script><b>\n&amp; $x$ it's"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SAEs at two sites, and a prompt that would break out of its page."""
    root = tmp_path_factory.mktemp("page")
    model = tiny_llama(root / "model")
    features: list[Features] = [
        write_features(root / str(i), model, tiny_sae(model, site, seed=i))
        for i, site in enumerate(("layers.0.resid_post", "layers.1.resid_post"))
    ]
    stage.run(config(features, root / "out", prompt=HOSTILE), solo())
    return root / "out"


def opened(browser: Browser, folder: Path, **how: object) -> tuple[Page, list[str]]:
    page, said = browser.new_page(**how), []  # type: ignore[arg-type]
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto((folder / "attribution.html").as_uri())
    page.wait_for_selector("#rows tr")
    return page, said


def test_what_the_page_shows(browser: Browser, folder: Path) -> None:
    found = read_attribution(folder)
    page, said = opened(browser, folder)
    assert page.inner_text("#headline") == "Why “a” and not “e”?"
    assert page.locator("#tokens button").count() == len(found["tokens"])
    assert page.locator("#tokens").text_content() == "".join(found["tokens"]).replace("\n", "↵\n")
    assert page.locator("#rows tr").count() == len(found["features"]) == 20
    assert page.locator("#heat tbody tr").count() == len(found["grid"])
    assert page.locator("#charts circle").count() == 20
    cells = page.locator("#heat td[data-tip]").count()
    assert cells == sum(len(row["positions"]) for row in found["grid"])
    assert page.locator("#shading button").count() == 4, "all, each site, what the SAEs do not explain"
    assert said == []


def test_a_row_opens_its_evidence_and_a_token_its_features(browser: Browser, folder: Path) -> None:
    found = read_attribution(folder)
    page, said = opened(browser, folder)
    page.locator("#rows tr").first.click()
    assert "Promotes" in page.inner_text("#rows .evidence")
    assert page.locator("#rows .evidence .sentence mark").count() > 0
    page.locator("#rows tr.open").press("Enter")
    assert page.locator("#rows .evidence").count() == 0
    position = found["features"][0]["positions"][0]
    page.locator("#tokens button").nth(position).click()
    here = sum(position in row["positions"] for row in found["features"])
    assert page.locator("#rows tr").count() == here < 20
    page.click("text=Show all")
    assert page.locator("#rows tr").count() == 20
    page.click("#columns button:text('Ablation')")
    first = max(found["features"], key=lambda row: abs(row["effect"]))
    assert f"#{first['latent']}" in page.locator("#rows tr").first.inner_text()
    page.hover("#heat td[data-tip] >> nth=0")
    assert "attribution" in page.inner_text("#tip")
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction(browser: Browser, folder: Path, scheme: str) -> None:
    page, said = opened(browser, folder, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.locator("#rows tr").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#rows td.what").first.bounding_box()["width"] > 120  # type: ignore[index]
    assert said == []

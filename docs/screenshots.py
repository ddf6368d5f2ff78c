"""Makes the pictures of the app and of a report in `docs/images/`, from what ships with the package or from a finished demo.

    python -m docs.screenshots --search support
    python -m docs.screenshots --demo runs/demo --search years --prompts "This morning I"
    python -m docs.screenshots --report report/ --latent 561     # a report with a map, instead of the app

What they show is what the app does: nothing is drawn in afterwards. Texts are greedy, so that a picture can be made again.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from playwright.sync_api import Browser, Page

from tests.browser import open_browser, running_app

DESKTOP = {"width": 1440, "height": 1000}
PHONE = {"width": 390, "height": 844}


@dataclass(frozen=True, kw_only=True)
class ShotConfig:
    """Which features and texts are shown."""

    demo: Path | None = None
    """Folder of a finished `python -m demo`. None: what ships with the package."""
    strengths: Path | None = None
    """Folder of `inference.steering_eval`, if one was made for that demo."""
    search: str = ""
    """What to look for; the first feature found is opened and steered. Empty: the first one offered to begin with."""
    prompts: tuple[str, ...] = ("This morning I", "She looked at the")
    """Prompts of the comparison."""
    strength: float | None = None
    """Strength of the edit; None: as offered."""
    message: str = "What did you see on your journey?"
    """What is said in the chat."""
    report: Path | None = None
    """Folder of `interpretability.report --map`: pictures of it, and of its map, in place of the app's."""
    latent: int = 0
    """Feature that is open in two of those."""
    out: Path = Path("docs/images")
    """Folder of the pictures."""


def flags(config: ShotConfig) -> list[str]:
    """Flags of the app for this demo."""
    if config.demo is None:
        return []
    folders = {"sae": config.demo / "run" / "sae", "top": config.demo / "top", "explanations": config.demo / "explanations"}
    chosen = [part for name, path in folders.items() for part in (f"--{name}", str(path))]
    return [*chosen, "--strengths", str(config.strengths)] if config.strengths else chosen


def open_app(browser: Browser, address: str, size: dict[str, int], dark: bool = False) -> Page:
    page = browser.new_page(viewport=size, device_scale_factor=2 if size is PHONE else 1)  # type: ignore[arg-type]
    page.set_default_timeout(30_000)
    page.goto(address)
    page.wait_for_selector("#results .hit")
    if dark:
        page.locator(".theme").click()
    return page


def steer(page: Page, config: ShotConfig) -> None:
    """Find the feature, open its card, edit with it, and generate to the end."""
    if config.search:
        page.locator("#query textarea").fill(config.search)
        page.wait_for_selector(f'#results .hits[data-query="{config.search}"]')
    page.locator("#results .hit").first.click()
    page.wait_for_selector("#card h2")
    page.locator("#card .steer").click()
    page.wait_for_selector("#edit-0", state="visible")
    if config.strength is not None:
        set_number(page, "#edit-0 .strength input[type=number]", config.strength)
    page.locator("#sampling-fold button").click()
    set_number(page, "#temperature input[type=number]", 0)
    set_number(page, "#repetition input[type=number]", 1.2)
    page.locator("#sampling-fold button").click()
    page.locator("#prompts textarea").fill("\n".join(config.prompts))
    page.locator("#generate").click()
    page.wait_for_selector("#columns .sides:not([aria-busy]) .steered .new", timeout=120_000)
    page.wait_for_selector("#legend .scale")


def set_number(page: Page, selector: str, value: float) -> None:
    box = page.locator(selector).first
    box.fill(f"{value:g}")
    box.press("Tab")


def shoot(page: Page, path: Path, full: bool = False) -> None:
    """A picture once colours have stopped moving, with nothing in focus or under the mouse."""
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(700)
    page.screenshot(path=path, full_page=full)


def shoot_report(folder: Path, latent: int, out: Path) -> None:
    """The report's beginning, one feature in dark and on a phone, and the map."""
    address, feature = folder.resolve().as_uri(), f"report.html#latent={latent}"
    with open_browser() as browser:
        for name, what, size, ready, dark in (
            ("report.png", "report.html", {"width": 1280, "height": 1400}, "#rows tr", False),
            ("report-dark.png", feature, {"width": 1280, "height": 1150}, ".halves", True),
            ("report-phone.png", feature, PHONE, ".halves", False),
            ("map.png", "map.html", {"width": 1280, "height": 860}, "canvas", False),
        ):
            page = browser.new_page(
                viewport=size,  # type: ignore[arg-type]
                color_scheme="dark" if dark else "light",
                device_scale_factor=1.5 if size is PHONE else 1,
                is_mobile=size is PHONE,
                has_touch=size is PHONE,
            )
            page.goto(f"{address}/{what}")
            page.wait_for_selector(ready)
            shoot(page, out / name)
            page.close()


def main(config: ShotConfig) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    if config.report is not None:
        shoot_report(config.report, config.latent, config.out)
        return
    with running_app(flags(config)) as (address, _), open_browser() as browser:
        page = open_app(browser, address, DESKTOP)
        steer(page, config)
        shoot(page, config.out / "app.png")
        page.locator(".theme").click()
        shoot(page, config.out / "app-dark.png")
        page.locator(".theme").click()
        page.get_by_role("tab", name="Chat").click()
        page.locator("#message textarea").fill(config.message)
        page.locator("#send").click()
        page.wait_for_selector("#chat-stop:enabled")
        page.wait_for_selector("#send:enabled", timeout=120_000)
        shoot(page, config.out / "app-chat.png")
        page.set_viewport_size({"width": 1440, "height": 1900})
        page.wait_for_timeout(300)
        page.locator(".reading").screenshot(path=config.out / "app-card.png")
        page.close()
        page = open_app(browser, address, PHONE)
        steer(page, config)
        page.evaluate("document.querySelector('#read').scrollIntoView()")
        shoot(page, config.out / "app-phone.png")


if __name__ == "__main__":
    main(tyro.cli(ShotConfig, description=__doc__))

"""How long a person waits in the app: for the first token after a click, for a search, for a card; and how fast it refuses.

    python -m benchmarks.bench_app                                   the embedded model
    python -m benchmarks.bench_app --flags "--model M --sae run/sae --top top/"

The app runs as a process of its own and is pressed in headless Chromium. Times are taken within the page, from the click until
the text stands there, so that they hold what the browser draws and not what the driver of the test adds.
"""

import json
import shlex
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx
import tyro
from playwright.sync_api import Page

from tests.browser import open_browser, running_app

FIRST_TOKEN_MS = 300
REFUSED_MS = 100
UNTIL = """async ([press, seen]) => {
    const began = performance.now();
    document.querySelector(press).click();
    while (!document.querySelector(seen)) {
        if (performance.now() - began > 20000) throw new Error(`${seen} did not come`);
        await new Promise((resolve) => setTimeout(resolve, 1));
    }
    return performance.now() - began;
}"""
"""Milliseconds from a click on `press` until there is something that `seen` selects, looked at every millisecond."""
NEW_TOKENS = 200
"""So many that a text is not complete before its first token was drawn: of answers that come together the page shows the last."""
WRITTEN = "#columns [aria-busy] .new:not(:empty)"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured."""

    flags: str = ""
    """Flags of inference.app; empty serves the embedded model."""
    out: Path = Path("bench_app.json")
    """JSON with every time."""
    rounds: int = 20
    """Clicks of each kind; one before them is not counted."""


class Times(NamedTuple):
    """Milliseconds of one kind of wait, and what they must not exceed at the median (0: no mark)."""

    name: str
    values: list[float]
    mark: float = 0

    def __str__(self) -> str:
        ordered = sorted(self.values)
        middle, high = statistics.median(ordered), ordered[max(0, round(0.95 * len(ordered)) - 1)]
        reached = f"mark {self.mark:g}: {'reached' if middle <= self.mark else 'MISSED'}" if self.mark else ""
        return f"{self.name:<44} median {middle:7.1f} ms   95 % {high:7.1f} ms   {reached}"


def first_tokens(page: Page, rounds: int, name: str) -> Times:
    """From a click on Generate to the first token in sight; each generation ends before the next begins."""
    values = []
    for _ in range(rounds + 1):
        page.wait_for_selector("#generate:enabled")
        values.append(page.evaluate(UNTIL, ["#generate", WRITTEN]))
        page.wait_for_selector("#generate:enabled")
    return Times(f"first token, {name}", values[1:], FIRST_TOKEN_MS)


def cards(page: Page, rounds: int) -> Times:
    """From a click in the list to the card of that feature."""
    values = []
    for i in range(rounds):
        hit = f"#results li:nth-child({1 + i % 6}) .hit"
        latent = page.get_attribute(hit, "data-open")
        values.append(page.evaluate(UNTIL, [hit, f'.card[data-latent="{latent}"]']))
    return Times("card", values)


def refusals(address: str, rounds: int) -> Times:
    """A prompt of 1 MB sent past the page."""
    body = json.dumps({"data": ["x" * 2**20], "fn_index": 0, "session_hash": "bench"})
    with httpx.Client(base_url=address) as http:

        def one() -> float:
            began = time.perf_counter()
            assert http.post("/gradio_api/queue/join", content=body).status_code == 413
            return 1e3 * (time.perf_counter() - began)

        return Times("1 MB prompt refused", [one() for _ in range(rounds)], REFUSED_MS)


def measure(config: BenchConfig) -> Iterator[Times]:
    """All waits, in one page."""
    with running_app(shlex.split(config.flags)) as (address, _), open_browser() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(address)
        page.wait_for_selector("#results .hit")
        page.wait_for_timeout(1000)  # a click before the page has found its listeners is lost
        page.locator("#sampling-fold button").click()
        page.locator("#new-tokens input[type=number]").fill(str(NEW_TOKENS))
        page.locator("#new-tokens input[type=number]").press("Tab")
        yield first_tokens(page, config.rounds, "no edits")
        if page.locator("#results [data-steer]").count():
            page.locator("#results [data-steer]").first.click()
            page.wait_for_selector("#edit-0", state="visible")
            yield first_tokens(page, config.rounds, "baseline and steered")
            yield cards(page, config.rounds)
        yield refusals(address, config.rounds)


def main(config: BenchConfig) -> None:
    found = []
    for times in measure(config):
        print(times, flush=True)
        found.append(times._asdict())
    config.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))

"""How long the report takes to open, to show a feature and to search, in headless Chromium, from the disk.

    python -m benchmarks.bench_report --report runs/demo/report --times 1 16

`--times 16` measures a copy of the report with 16 times its features: columns, blocks and text repeated under new numbers. Each
round opens the page in a fresh profile; printed are median and slowest of the rounds.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from playwright.sync_api import Browser

from core.cli import one_line_errors, parse
from core.files import make_folder
from interpretability.pages.page import json_text
from interpretability.report import REPORT_FILE
from tests.browser import open_browser

QUERIES = ("river", "w", "the of")


@dataclass(frozen=True)
class BenchConfig:
    """What to open, and how often."""

    report: Path
    """Folder written by interpretability.report, without --one-file."""
    times: tuple[int, ...] = (1, 16)
    """Multiples of its features to measure."""
    rounds: int = 5
    """Fresh profiles in which each is opened."""


class Measured(NamedTuple):
    """Seconds, or megabytes."""

    what: str
    value: float


def repeated(report: Path, out: Path, times: int) -> Path:
    """Write a report of `times` as many features to `out`."""
    page = (report / REPORT_FILE).read_text(encoding="utf-8")
    begin = page.index('id="data">') + len('id="data">')
    end = page.index("</script>", begin)
    data = json.loads(page[begin:end])
    n = len(data["latents"]["title"])
    data["latents"] = {name: column * times for name, column in data["latents"].items()}
    data["order"] = [latent + n * i for latent in data["order"] for i in range(times)]
    data["failed"] = [latent + n * i for i in range(times) for latent in data["failed"]]
    data["about"]["fired"] *= times
    for folder, per_file in (("features", data["block"]), ("words", data["words_block"])):
        files = sorted((report / folder).glob("*.js"))
        if n % per_file:
            raise ValueError(f"{report}: {n} features do not fill whole blocks of {per_file}; use the full demo's report")
        make_folder(out / folder)
        for index in range(times * len(files)):
            name = f"{folder}/{index:05d}"
            text = files[index % len(files)].read_text(encoding="utf-8")
            (out / f"{name}.js").write_text(f'loaded("{name}"{text[text.index(",") :]}', encoding="utf-8")
    (out / REPORT_FILE).write_text(page[:begin] + json_text(data) + page[end:], encoding="utf-8")
    return out


def visit(browser: Browser, report: Path) -> Iterator[Measured]:
    """What one user waits for."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    began = time.perf_counter()
    page.goto((report / REPORT_FILE).resolve().as_uri(), wait_until="commit")
    page.wait_for_selector("#rows tr")
    yield Measured("list on screen, s", time.perf_counter() - began)
    began = time.perf_counter()
    page.evaluate("location.hash = `#latent=${size - 3}`")
    page.wait_for_selector("#dialog-body .halves")
    yield Measured("a feature opened, s", time.perf_counter() - began)
    page.keyboard.press("Escape")
    began = time.perf_counter()
    page.evaluate("readWords()")
    yield Measured("text of all features read, s", time.perf_counter() - began)
    for query in QUERIES:
        timed = "q => { $('query').value = q; const began = performance.now(); search(); return (performance.now() - began) / 1000; }"
        yield Measured(f"search for {query!r}, s", page.evaluate(timed, query))
    yield Measured("heap, MB", page.evaluate("performance.memory.usedJSHeapSize") / 1e6)
    context.close()


def main() -> None:
    with one_line_errors():
        config = parse(BenchConfig, __doc__ or "")
        for times in config.times:
            with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
                report = config.report if times == 1 else repeated(config.report, Path(folder), times)
                found: dict[str, list[float]] = {}
                for _ in range(config.rounds):
                    for what, value in visit(browser, report):
                        found.setdefault(what, []).append(value)
                size = (report / REPORT_FILE).stat().st_size / 1e6
                print(f"{times} x the features, page of {size:.1f} MB, {config.rounds} rounds: median (slowest)")
                for what, values in found.items():
                    print(f"  {what:32s} {statistics.median(values):8.3f} ({max(values):.3f})")


if __name__ == "__main__":
    main()

"""A headless Chromium on the real app: what `test_app_browser.py` drives, and `docs/screenshots.py` shows."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parent.parent
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
START_S = 180


def chromium() -> str:
    """Path of Chromium. Where there is none the calling test skips with the reason; in CI it fails."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        reason = "no Chromium: apt-get install chromium, or set CHROMIUM to its path"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@contextlib.contextmanager
def open_browser(*arguments: str) -> Iterator[Browser]:
    """Debian's Chromium under Playwright, without its own background traffic, with further `arguments`."""
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS, *arguments])
        try:
            yield browser
        finally:
            browser.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_app(flags: list[str], environment: dict[str, str] | None = None) -> Iterator[tuple[str, int]]:
    """`python -m inference.app` in a process of its own; yields its address and process id once it says that it is open."""
    port = free_port()
    command = [sys.executable, "-m", "inference.app", *flags, "--port", str(port), "--device", "cpu", "--threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        with log.open("w") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | (environment or {}), stderr=said, stdout=subprocess.DEVNULL
            )
        try:
            _wait_until_open(process, log)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait(timeout=20)


def _wait_until_open(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if "is open at" in log.read_text():
            return
        time.sleep(0.2)
    raise AssertionError(f"the app did not open within {START_S} s:\n{log.read_text()}")


def press_once(page: Page, button: str) -> None:
    """A click as soon as the button takes one; from within the page, as the way through the driver can outlast a generation."""
    press = "(button) => { const b = document.querySelector(button); if (b.disabled) return false; b.click(); return true; }"
    page.wait_for_function(press, arg=button, polling=10)

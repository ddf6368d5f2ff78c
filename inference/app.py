"""The workbench: find features, steer with them, and compare, in a browser.

    python -m inference.app                              the embedded model on http://127.0.0.1:7860
    python -m inference.app --model M --sae run/sae --top top/ --explanations explanations/
    python -m inference.app --steer recipe.json          the page begins with these edits

The page is served on this machine alone, whatever GRADIO_SHARE or GRADIO_SERVER_NAME say. Another --host, or --public-link,
needs --password-file. Nothing is loaded from any other host, and no file but the app's own is served. Requests for a host
name that neither --host nor --allow-host gives, and calls from pages of other origins, are refused.
"""

import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from core.cli import machine, run_stage
from core.runtime import Runtime
from inference.dialogue import Style, check_style, style_of
from inference.recipes import SteeringConfig
from inference.session import open_session
from inference.web.calls import CallCheck
from inference.web.handlers import Handlers
from inference.web.hosts import HostGuard, served_names
from inference.web.middleware import Guard
from llama3.chat import has_chat
from llama3.tokenizer import Tokenizer

log = logging.getLogger("inference.app")

USER = "workbench"
Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class AppConfig(SteeringConfig):
    """Flags of `inference.app`."""

    port: int = machine(7860)
    """Port to serve on; 0 takes a free one."""
    host: str = machine("127.0.0.1")
    """Address to serve on. Any but this machine's own needs --password-file."""
    allow_host: tuple[str, ...] = machine(())
    """Further names or addresses, without ports, by which browsers reach this server: needed with --host 0.0.0.0 or ::, and
    behind a proxy, which must pass the Host header on. This machine's own and --host are always served."""
    public_link: bool = machine(False)
    """Ask Gradio's service for a public link; needs --password-file."""
    password_file: Path | None = machine(None)
    """File whose first line is the password for user "workbench". None asks for no password."""
    open_browser: bool = machine(False)
    """Open the page in the default browser."""
    style: str = machine("auto")
    """Chat format: template (the checkpoint's own), llama3 (the Llama 3 instruct models'), plain (a transcript), or auto: plain
    for the embedded model and for models without a chat format, else the template where there is one, else llama3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port}: expected 0 to 65535")
        if (self.public_link or not is_loopback(self.host)) and self.password_file is None:
            what = "--public-link" if self.public_link else f"--host {self.host}"
            raise ValueError(f"{what} lets other machines in; give --password-file FILE too, or stay on 127.0.0.1")
        served_names(self.host, self.allow_host)
        check_style(self.style)

    def chat_style(self, tokenizer: Tokenizer) -> Style:
        """As in `inference.chat`, but a page opens for models without a chat format too. ValueError for a style that this model
        cannot follow."""
        return "plain" if self.style == "auto" and not has_chat(tokenizer) else style_of(self.style, self.model, tokenizer)


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def is_unspecified(host: str) -> bool:
    """Whether an address stands for all of this machine's."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def run(config: AppConfig, runtime: Runtime) -> None:
    """Serve the page until Ctrl-C."""
    password = read_password(config.password_file)
    usable_port(config.host, config.port)  # before the model is loaded
    serve(open_handlers(config, runtime.device), config, password, block=True)


def open_handlers(config: AppConfig, device: torch.device) -> Handlers:
    """Load what `config` names; ValueError where a part is missing or does not belong to the others."""
    session = open_session(config, device, config.chat_style)
    handlers, recipe = Handlers(session, config.chat_style(session.tokenizer)), config.recipe(session)
    if not recipe.edits:
        return handlers
    try:
        return replace(handlers, start=handlers.applied(recipe.to_json()))
    except ValueError as error:
        raise ValueError(f"--steer {config.steer}: {error}") from None


def serve(handlers: Handlers, config: AppConfig, password: str | None = None, block: bool = False) -> tuple[Any, str]:
    """Start the server; returns Gradio's Blocks (its `close()` ends the server) and the address.

    With `block`, returns only when the server ends.
    """
    ignore_gradio_variables()  # before the imports below: Gradio reads its variables when it is imported
    from inference.web.layout import Page
    from inference.web.panels.events import MAX_THREADS, QUEUE_SIZE, inputs_of
    from inference.web.theme import stylesheet, theme

    blocks = Page(handlers).blocks
    blocks.queue(max_size=QUEUE_SIZE)
    names = served_names(config.host, config.allow_host)
    app, address, public = blocks.launch(
        server_name=f"[{config.host}]" if ":" in config.host else config.host,
        server_port=usable_port(config.host, config.port),
        share=config.public_link,
        auth=(USER, password) if password else None,
        inbrowser=config.open_browser,
        theme=theme(),
        css=stylesheet(),
        app_kwargs={"lifespan": _guarding(names, inputs_of(blocks)), "docs_url": None, "redoc_url": None},
        allowed_paths=[],
        blocked_paths=[str(Path.cwd())],
        max_file_size="64kb",
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        max_threads=MAX_THREADS,
        state_session_capacity=500,
    )
    assert isinstance(app.middleware_stack, HostGuard)
    if public:
        names.update(served_names(str(urlsplit(public).hostname), ()))
    if is_unspecified(config.host) and not config.allow_host:
        log.warning("--host %s without --allow-host NAME: browsers on other machines are refused", config.host)
    log.info("the workbench is open at %s%s; Ctrl-C ends it", address, f" for user {USER}" if password else "")
    if block:
        blocks.block_thread()
    return blocks, address


def ignore_gradio_variables() -> None:
    """Drop the variables that would open the page to others or call out; what this app does is said by its flags alone."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        log.info("%s is ignored; see --help for --host and --public-link", name)
        del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio keeps a record of up to 10,000 events for a page of figures that is not served here, and at the end of every event
    # makes a table of them all.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**62)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def usable_port(host: str, port: int) -> int:
    """`port`, or for 0 one that nothing listens on now; ValueError where it cannot be had."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--host {host} --port {port}: {error.strerror}; choose another, or --port 0 for a free one"
            ) from None
        return int(probe.getsockname()[1])


def read_password(path: Path | None) -> str | None:
    """The first line of the file; ValueError where it is too short to protect anything."""
    if path is None:
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or len(lines[0].strip()) < 8:
        raise ValueError(f"--password-file {path}: expected a first line of at least 8 characters")
    return lines[0].strip()


def _guarding(names: Collection[str], events: Mapping[int, Sequence[str]]) -> Lifespan:
    """What the server runs before its first request: our guards go around all of Gradio.

    Middleware that Gradio is given stands behind its own, which answers some requests (CORS) for
    any host and origin.
    """

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.middleware_stack = HostGuard(Guard(CallCheck(app.middleware_stack, events)), names)
        yield

    return lifespan


if __name__ == "__main__":
    run_stage(AppConfig, run, __doc__ or "")

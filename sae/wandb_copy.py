"""A copy of `metrics.jsonl` in Weights & Biases, made by a process of its own: training never waits for a server.

sae.wandb starts this file as a script; it imports nothing of ours. Standard input brings one line, an `Order` as JSON, and ends
when training does. What goes wrong is the last line on standard error.
"""

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

FAILED = 3
"""Exit code where not all lines are where they should be."""
POLL_S = 0.5
CHECKSUM = "xxh3"  # of each line of the file (core.lines.KEY), not a metric


class Order(NamedTuple):
    """What is to be copied, and how long that may take."""

    metrics: str
    folder: str
    """Where the library keeps its files."""
    mode: str
    """online or offline."""
    run_id: str
    after: int
    """The step that training continued from: offline, later ones alone are copied. A server says itself what it has."""
    config: dict[str, Any]
    open_s: float
    """Seconds that opening the run may take once training is over."""
    finish_s: float
    """Seconds that the rest may take once training is over."""


def main() -> None:
    order = Order(**json.loads(sys.stdin.readline()))
    opened, ended = threading.Event(), threading.Event()
    threading.Thread(target=_end_in_time, args=(order, opened, ended), daemon=True).start()
    try:
        run = _open(order)
    except Exception as error:  # whatever it is, it is told in a line and ends this copy alone
        _leave(FAILED, f"{type(error).__name__}: {error}")
    opened.set()
    try:
        first = run.step if order.mode == "online" else order.after + 1
        for line in follow(Path(order.metrics), ended):
            line.pop(CHECKSUM, None)
            if line["step"] >= first:
                run.log(line, step=line["step"], commit=True)
        run.finish()
    except Exception as error:
        _leave(FAILED, f"{type(error).__name__}: {error}")
    _leave(0, "")


def _open(order: Order) -> Any:
    """The library's run. What WANDB_... variables say goes before what is given here."""
    wandb = importlib.import_module("wandb")
    given = {"project": "llama3-sae", "dir": order.folder, "id": order.run_id, "resume": "allow"}
    names = {"project": "WANDB_PROJECT", "dir": "WANDB_DIR", "id": "WANDB_RUN_ID", "resume": "WANDB_RESUME"}
    chosen = {name: value for name, value in given.items() if not os.environ.get(names[name])}
    if order.mode == "offline":
        chosen.pop("resume", None)  # only a server can
    settings = wandb.Settings(silent=True, console="off")
    return wandb.init(mode=order.mode, config=order.config, settings=settings, **chosen)


def follow(path: Path, ended: threading.Event) -> Iterator[dict[str, Any]]:
    """The lines of `path` as they come, until `ended` is set and none is left."""
    with path.open(encoding="utf-8") as file:
        text = ""
        while True:
            last = ended.is_set()  # asked before reading, so that no line is missed
            while piece := file.readline():
                text += piece
                if text.endswith("\n"):
                    yield json.loads(text)
                    text = ""
            if last:
                return
            ended.wait(POLL_S)


def _end_in_time(order: Order, opened: threading.Event, ended: threading.Event) -> None:
    """Once training is over, whether it ended or was killed, end this process in time."""
    sys.stdin.read()
    ended.set()
    if not opened.wait(order.open_s):
        _leave(FAILED, f"the server did not answer within {order.open_s:g} s of the end")
    time.sleep(order.finish_s)
    _leave(FAILED, f"not all lines were taken within {order.finish_s:g} s of the end")


def _leave(code: int, why: str) -> NoReturn:
    """Without the library's exit hooks, which may wait for a server without end."""
    print(" ".join(why.split()), file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main()

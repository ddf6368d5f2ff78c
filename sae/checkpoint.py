"""Checkpoints of a training run: a fresh folder for each, complete or ignored; and the wish to stop."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from core import files
from core.artifact import MANIFEST, building, open_artifact
from core.runtime import Runtime

log = logging.getLogger("sae.train")

STATE = "state.safetensors"


def write_checkpoint(folder: Path, step: int, state: dict[str, Tensor], config: Any, runtime: Runtime) -> None:
    """Write `folder/step-00000100/`; all ranks call it, rank 0 writes. Its manifest comes last and marks it as complete."""
    with building(folder / f"step-{step:08d}", "checkpoint", config, runtime) as builder:
        if not builder.complete:
            if runtime.is_main:
                builder.publish(STATE, safetensors.torch.save(state))
            builder.finish([STATE] if runtime.is_main else [], {"step": step})


def newest_checkpoint(folder: Path, runtime: Runtime) -> dict[str, Tensor] | None:
    """The state in the newest complete checkpoint, None where there is none. Rank 0 decides which one that is."""
    path = runtime.on_main(lambda: next(_complete(folder, verify=True), None))
    return safetensors.torch.load_file(path / STATE) if path else None


def _complete(folder: Path, verify: bool) -> Iterator[Path]:
    """Complete checkpoints, newest first; with `verify`, those whose checksum is right."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            artifact = open_artifact(path, "checkpoint")
            if verify:
                artifact.file(STATE)
        except ValueError as error:
            log.warning("passing over a checkpoint: %s", error)
        else:
            yield path


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and incomplete ones older than those. Rank 0 calls it."""
    complete = list(_complete(folder, verify=False))
    for path in sorted(folder.glob("step-*")):
        if complete and path not in complete[:keep] and path < complete[0]:
            files.remove(path / MANIFEST)  # first, so that a kill in between leaves an incomplete one
            for file in path.iterdir():
                files.remove(file)
            path.rmdir()


@dataclass
class StopWish:
    """Set by SIGTERM and by Ctrl-C; the loop ends after its current step."""

    signal: int = 0


@contextmanager
def stop_signals() -> Iterator[StopWish]:
    """Within the block, SIGTERM and Ctrl-C only set the wish. A second Ctrl-C acts as usual; a second SIGTERM does not, because
    a launcher forwards the one that the whole process group got already. Only the main thread gets signals.
    """
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        wish.signal = number
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])

    for wanted in (signal.SIGTERM, signal.SIGINT):
        previous[wanted] = signal.signal(wanted, note)
    try:
        yield wish
    finally:
        for wanted, handler in previous.items():
            signal.signal(wanted, handler)

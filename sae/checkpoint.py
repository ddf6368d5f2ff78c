"""Checkpoints of a training run: written beside the training, complete or ignored; and the wish to stop.

A checkpoint is a folder: `shared.safetensors`, what all ranks hold, and `latents-00000.safetensors` and so on, in order of the
latents. Any number of ranks continues from it, each reading the rows of its own latents. The manifest, last, makes it count.
"""

import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from core import files
from core.artifact import MANIFEST, Artifact, Builder, Manifest, building, open_artifact
from core.flags import changed_flags
from core.runtime import Mesh, Runtime
from sae.trainer import State

log = logging.getLogger("sae.train")

SHARED = "shared.safetensors"


def latents_name(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


class Checkpoints:
    """The `checkpoints/` of a run, of which the newest `keep` stay. All ranks call all methods, in the same order.

    `begin` hands a copy of the state to a thread of each rank that owns a part of it; `finish` waits for all of them, and only
    then is the checkpoint complete. In between, `busy` says whether this rank is still writing.
    """

    def __init__(self, folder: Path, keep: int, config: Any, runtime: Runtime, mesh: Mesh) -> None:
        self._folder, self._keep, self._config, self._runtime, self._mesh = folder, keep, config, runtime, mesh
        self._thread = ThreadPoolExecutor(1)
        self._held = ExitStack()
        self._builder: Builder | None = None
        self._written: Future[list[str]] | None = None
        self._step = 0

    @property
    def pending(self) -> bool:
        """Whether there is a checkpoint that `finish` was not called for; the same on all ranks."""
        return self._builder is not None

    @property
    def busy(self) -> bool:
        return self._written is not None and not self._written.done()

    def begin(self, step: int, state: State) -> None:
        """Start to write `step-00000100/`."""
        assert not self.pending
        path = self._folder / f"step-{step:08d}"
        # What a crash, perhaps with other ranks, left behind there, or a damaged one that was passed over.
        self._runtime.on_main(lambda: shutil.rmtree(path, ignore_errors=True))
        self._builder = self._held.enter_context(building(path, "checkpoint", self._config, self._runtime))
        self._step = step
        self._written = self._thread.submit(self._write, self._builder, state)

    def _write(self, builder: Builder, state: State) -> list[str]:
        names = []
        if self._mesh.data.rank == 0:
            rows = len(state.latents["last_fired"])
            content = safetensors.torch.save(state.latents)
            names.append(builder.publish(latents_name(self._mesh.latent.rank), content, rows=rows).name)
        if self._runtime.is_main:
            names.append(builder.publish(SHARED, safetensors.torch.save(state.shared)).name)
        return names

    def finish(self) -> None:
        """Wait until all ranks have written, then complete the checkpoint and remove older ones; any rank's error is raised."""
        if self._builder is None or self._written is None:
            return
        error = self._written.exception()
        if isinstance(error, Exception) and not isinstance(error, ValueError | OSError):
            raise error
        failures = [failure for failure in self._runtime.gather_objects(error) if failure]
        if failures:
            raise failures[0]
        self._builder.finish(self._written.result(), {"step": self._step})
        self._held.close()
        self._builder = self._written = None
        self._runtime.on_main(lambda: remove_old_checkpoints(self._folder, self._keep))

    def newest(self, first: int, n_latents: int) -> State | None:
        """The state in the newest complete checkpoint, with the latents from `first` on; None where there is none.

        ValueError where it is of a run with other flags.
        """
        path = self._runtime.on_main(lambda: next(complete(self._folder, verify=True), None))
        if path and (changed := changed_flags(Manifest.read(path).config, self._config)):
            raise ValueError(f"{path}: is of a run with {'; '.join(changed)} is asked for; choose another --out")
        return read_state(path, first, n_latents) if path else None

    def close(self) -> None:
        """Leave what is not finished as it is: incomplete."""
        self._thread.shutdown()
        self._held.close()


def read_state(path: Path, first: int, n_latents: int) -> State:
    """The state in the checkpoint `path`, with the `n_latents` latents from `first` on."""
    artifact = open_artifact(path, "checkpoint")
    parts: dict[str, list[torch.Tensor]] = {}
    start = 0
    for name in sorted(name for name in artifact.names if name != SHARED):
        low, high = max(first, start), min(first + n_latents, start + artifact.rows(name))
        if low < high:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    parts.setdefault(key, []).append(file.get_slice(key)[low - start : high - start])
        start += artifact.rows(name)
    return State(safetensors.torch.load_file(path / SHARED), {key: torch.cat(pieces) for key, pieces in parts.items()})


def complete(folder: Path, verify: bool) -> Iterator[Path]:
    """Complete checkpoints, newest first; with `verify`, those whose checksums are right."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            artifact: Artifact = open_artifact(path, "checkpoint")
            if verify:
                for name in artifact.names:
                    artifact.file(name)
        except ValueError as error:
            log.warning("passing over a checkpoint: %s", error)
        else:
            yield path


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and incomplete ones older than those. Rank 0 calls it."""
    found = list(complete(folder, verify=False))
    for path in sorted(folder.glob("step-*")):
        if found and path not in found[:keep] and path < found[0]:
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

    wakeup = signal.set_wakeup_fd(-1)  # core.ending, which ends a process that does not hear the signal
    for wanted in (signal.SIGTERM, signal.SIGINT):
        previous[wanted] = signal.signal(wanted, note)
    try:
        yield wish
    finally:
        for wanted, handler in previous.items():
            signal.signal(wanted, handler)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

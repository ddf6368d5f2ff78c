"""Signs of life between the ranks of a job, so that one that was killed or frozen ends it, by name, whatever it was doing.

Each rank has a thread that counts up in the store of the process group, and reads the count of the next rank. A collective
notices a missing rank only after its time-out, which must be long: ranks wait for one another for minutes while all is well.
"""

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

BEAT_S = 2.0
SILENT_BEATS = 10
FAR_BEATS = 15
"""Beats of this rank in which the next one gives no sign before it is given up: where its process can be seen to be stopped or
gone, and where it is on another machine. One that is seen to run may be busy in a library that lets no thread in, and has
until the time-out. Beats, not seconds: a job that is suspended as a whole and goes on has missed none."""
ELSEWHERE = "?"
ENDED = "ZXTt"
"""What the kernel calls processes that have ended or are stopped."""


class Pulse:
    """This rank's signs of life in `store`, and its eye on the next rank that has not left."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float) -> None:
        self._store, self._rank, self._world = store.clone(), rank, world_size  # the main thread may block the other one
        self._beat_s = min(BEAT_S, timeout_s / SILENT_BEATS)
        self._busy_beats = timeout_s / self._beat_s
        self._over = threading.Event()
        self._store.set(f"process {rank}", f"{socket.gethostname()} {os.getpid()}")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self, in_order: bool) -> None:
        """No more signs; `in_order` says that nobody should wait for them either."""
        self._over.set()
        self._thread.join(self._beat_s)
        with contextlib.suppress(RuntimeError):  # the one that holds the store has left
            if in_order:
                self._store.set(f"left {self._rank}", "")

    def _watch(self) -> None:
        try:
            watched, last, missed = self._rank, -1, 0
            while not self._over.wait(self._beat_s):
                self._store.add(f"pulse {self._rank}", 1)
                if watched == self._rank or self._store.check([f"left {watched}"]):
                    watched, last, missed = self._next(), -1, 0
                if watched == self._rank:
                    continue
                pulse = self._store.add(f"pulse {watched}", 0)
                missed = 0 if pulse != last else missed + 1
                last = pulse
                if missed >= SILENT_BEATS and missed >= self._patience(watched) and not self._over.is_set():
                    self._give_up(watched, missed)
        except RuntimeError:  # the store is gone, and its launcher with it; the next collective says so
            pass

    def _next(self) -> int:
        """The next rank that has not left; this one where all others have."""
        ring = [(self._rank + step) % self._world for step in range(1, self._world)]
        return next((rank for rank in ring if not self._store.check([f"left {rank}"])), self._rank)

    def _patience(self, rank: int) -> float:
        """Beats after which a silent rank is given up."""
        state = self._state(rank)
        return SILENT_BEATS if state in ENDED else FAR_BEATS if state == ELSEWHERE else max(FAR_BEATS, self._busy_beats)

    def _give_up(self, rank: int, missed: int) -> None:
        """End this process, and with it the job. The main thread may be inside a collective, which no exception reaches."""
        print(
            f"error (rank {self._rank}): rank {rank} has given no sign of life for {missed * self._beat_s:.0f} s: it is frozen "
            "or was killed, or its machine is gone; the same command continues from here",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    def ended_ranks(self) -> list[int]:
        """The ranks on this machine whose process has ended or is stopped."""
        try:
            others = [rank for rank in range(self._world) if not self._store.check([f"left {rank}"])]
            return [rank for rank in others if self._state(rank) in ENDED]
        except RuntimeError:  # the one that holds the store has ended
            return []

    def _state(self, rank: int) -> str:
        """What the kernel calls the state of a rank's process, a letter; ELSEWHERE where it cannot be asked."""
        if not self._store.check([f"process {rank}"]):
            return ELSEWHERE
        host, _, process = self._store.get(f"process {rank}").decode().rpartition(" ")
        if host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return ELSEWHERE
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1] or ELSEWHERE
        except OSError:
            return "X"

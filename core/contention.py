"""A machine that other programs use too: how long this process waits for a core, and how many cores are taken.

Times come from the scheduler (Linux's schedstat); elsewhere nothing is said.
"""

import os
from pathlib import Path

MUCH = 0.2
"""Share of the time without a core from which on people are told."""


class Waiting:
    """How much of the time in which threads of this process had work they had no core."""

    def __init__(self) -> None:
        self._last = _scheduled()

    def share(self) -> float:
        """Since it was last asked; 0 where the system does not say."""
        last, self._last = self._last, _scheduled()
        ran, waited = (
            sum(max(0, now[i] - last.get(thread, (0, 0))[i]) for thread, now in self._last.items()) for i in range(2)
        )
        return waited / (ran + waited) if ran + waited else 0.0

    def notes(self) -> dict[str, str]:
        """`share` for a line of progress, where it is large."""
        share = self.share()
        return {"without a core": f"{share:.0%} of the time"} if share >= MUCH else {}


def _scheduled() -> dict[str, tuple[int, int]]:
    """Of each thread the nanoseconds that it ran, and that it waited for a core."""
    found = {}
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            ran, waited, _ = task.read_text().split()
        except (OSError, ValueError):  # the thread has ended
            continue
        found[task.parent.name] = (int(ran), int(waited))
    return found


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_quota() -> float | None:
    """Cores' worth of time that a container grants (cgroup 2), None where there is no limit."""
    try:
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        return None

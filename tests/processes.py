"""What jobs leave behind: processes of their group, and shared memory that no process holds any more."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

SHARED = Path("/dev/shm")
RACE_S = 5.0
"""Within which a name that another process has just made is mapped by it, or removed."""


def group_members(group: int) -> list[int]:
    """Processes of a process group that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def shared_memory() -> set[str]:
    """All names there but those of the tests' own folders."""
    return {name for name in os.listdir(SHARED) if not name.startswith("tmp")} if SHARED.is_dir() else set()


def abandoned(before: set[str]) -> set[str]:
    """Names in shared memory that were not there `before` and that nobody holds. Other tests run meanwhile, in processes of
    their own: what these hold is theirs.
    """
    ends = time.monotonic() + RACE_S
    while (found := _not_held(shared_memory() - before)) and time.monotonic() < ends:
        time.sleep(0.05)
    return found


def _not_held(names: set[str]) -> set[str]:
    held = set(_inodes_in_use()) if names else set()
    found = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if (SHARED / name).stat().st_ino not in held:
                found.add(name)
    return found


def _inodes_in_use() -> Iterator[int]:
    """Of files there that some process has mapped or opened; a semaphore was mapped under another name."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for line in (process / "maps").read_text().splitlines():
                if f" {SHARED}/" in line:
                    yield int(line.split()[4])
        with contextlib.suppress(OSError):
            for opened in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(opened).startswith(f"{SHARED}/"):
                        yield opened.stat().st_ino

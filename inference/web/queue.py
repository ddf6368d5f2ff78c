"""Whose generation runs, who waits for a turn, and who asked to stop: one `Turns` serves all clients of an app.

    with turns.take(client, "chat") as turn:
        if turn.wait():                     # False: stopped while it waited
            for token in ...:
                if turn.stopped:
                    break

A turn ends with its block, however that is left, so nothing of a request outlives it.
"""

import contextlib
import threading
from collections.abc import Iterator

RUNNING = 2
"""Generations that run at once."""
WAITING = 32
"""Generations that may wait for them; the next one is refused."""


class Turn:
    """One generation's place in the line."""

    def __init__(self, turns: "Turns", client: str, kind: str) -> None:
        self._turns = turns
        self.client, self.kind = client, kind
        self.stopped = ""
        """Why it was asked to end; empty while nobody has asked."""

    def wait(self) -> bool:
        """Block until it may run (True) or is stopped (False)."""
        changed = self._turns.changed
        with changed:
            changed.wait_for(lambda: bool(self.stopped) or self._turns.ahead_of(self) == 0)
        return not self.stopped

    @property
    def ahead(self) -> int:
        """Generations that must end before this one may run."""
        with self._turns.changed:
            return self._turns.ahead_of(self)


class Turns:
    """The line of all generations, first come first served. Every method may be called from any thread."""

    def __init__(self, running: int = RUNNING, waiting: int = WAITING) -> None:
        self._running, self._waiting = running, waiting
        self._line: list[Turn] = []
        self.changed = threading.Condition(threading.RLock())
        """Notified whenever a turn is stopped or ends."""

    @contextlib.contextmanager
    def take(self, client: str, kind: str) -> Iterator[Turn]:
        """A place at the end of the line for a generation of `client`; ValueError where the line is full."""
        turn = Turn(self, client, kind)
        with self.changed:
            if len(self._line) >= self._running + self._waiting:
                raise ValueError(f"busy: {self._waiting} requests wait already; try again in a moment")
            self._line.append(turn)
        try:
            yield turn
        finally:
            with self.changed:
                self._line.remove(turn)
                self.changed.notify_all()

    def stop(self, client: str, kind: str | None = None, why: str = "stop") -> None:
        """Ask the generations of `client`, of one kind or of all, to end; does nothing where there is none."""
        with self.changed:
            for turn in self._line:
                if turn.client == client and kind in (None, turn.kind):
                    turn.stopped = why
            self.changed.notify_all()

    def ahead_of(self, turn: Turn) -> int:
        """Turns that must end before `turn` may run; the caller holds `changed`."""
        return max(0, self._line.index(turn) - self._running + 1)

    def __len__(self) -> int:
        with self.changed:
            return len(self._line)

"""A process that cuts documents for `capture.cutting`: JSON lines in by standard input, out by standard output.

It ends within moments of its parent, however that ended and whatever it is doing, its own imports included. So the rest of the
package is imported late, and no semaphore or other thing that outlives a process is shared with the parent.
"""

import json
import os
import signal
import sys
import threading
import time
from typing import Any

LOOK_S = 0.2


def end_with(parent: int) -> None:
    """Let a thread end this process once `parent` is no longer its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """The first line holds the fields of a `Cutting`; each other one the names and texts of documents, answered by units."""
    end_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    from capture.cutting import Cutting, units_of

    cutter = None
    for line in sys.stdin.buffer:
        found = json.loads(line)
        try:
            if cutter is None:
                cutter = Cutting(**found).cutter()
                continue
            answer: dict[str, Any] = {"units": [units_of(cutter, name, text) for name, text in found]}
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""How a stage ends that is asked to: Ctrl-C and SIGTERM with one line each, from the first import on.

The package of every stage imports this before anything else. A second or more of imports follows, in which Ctrl-C would print
a traceback out of the middle of a library. Where anything but `python -m` of a stage imports the package, nothing is changed.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

PACKAGES = ("capture", "sae", "interpretability", "inference", "demo")
INTERRUPTED = "interrupted; the same command continues from here"
ASKED_TO_STOP = "asked to stop (SIGTERM); what is finished is kept"
GRACE_S = 5.0
"""Seconds that a process asked to stop may stay in an operation that hears no signals, such as waiting for other ranks."""
CLOSING_S = 20.0
"""Seconds in which a process that heard it may close what is open; launchers kill after 30."""
NO_MEMORY = re.compile(r"allocate memory|out of memory|bad_alloc|failed to map segment|start new thread", re.IGNORECASE)
STDERR = 2

also_say: Callable[[], str] = str
"""What else to say of an end that came from outside: core.runtime names ranks that ended."""


def lack_of_memory(error: BaseException) -> str:
    """What to say of an error whose reason is that memory ran out, in one line; empty for any other."""
    reason = (str(error).splitlines() or [""])[0]
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError | ImportError) and NO_MEMORY.search(reason)):
        return ""
    reason = re.sub(r"^\[enforce fail at \S+\] \S.*?\. ", "", reason)[:200] or "an allocation failed"
    return f"out of memory ({reason}); free some, lift the limit (`ulimit -v`), or ask for less at a time"


def say_at_interrupt() -> None:
    """Within imports, Ctrl-C says one line, and so does a lack of memory; then the process ends as Python ends it."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(INTERRUPTED, file=sys.stderr, flush=True)
        elif said := lack_of_memory(error):
            print(f"error: {said}", file=sys.stderr, flush=True)
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def end_at_sigterm() -> None:
    """SIGTERM says a line and ends the process with code 143, by SystemExit, so that what is open is closed.

    Where the main thread does not hear it for GRACE_S, or takes longer than CLOSING_S to end, a thread ends the process. Only
    the main thread may ask for this; children that are forked end as usual.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    heard = threading.Event()

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a launcher forwards what the whole process group got already
        heard.set()
        _say()
        raise SystemExit(128 + number)

    def wait() -> None:
        while True:
            came = signal.SIGTERM in os.read(ours, 64)
            if not came or not (heard.is_set() or signal.getsignal(signal.SIGTERM) is end):
                continue  # another listens now, as training does
            if heard.wait(GRACE_S):
                time.sleep(CLOSING_S)
            else:
                _say()
            os._exit(128 + signal.SIGTERM)

    def in_child() -> None:
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, end)
    os.register_at_fork(after_in_child=in_child)
    threading.Thread(target=wait, daemon=True).start()


def _say() -> None:
    os.write(STDERR, f"{ASKED_TO_STOP}{also_say()}\n".encode())  # a print may be what the signal came into


def _is_stage() -> bool:
    """Whether this process is `python -m` of something in our packages."""
    arguments = sys.orig_argv
    return "-m" in arguments[:-1] and arguments[arguments.index("-m") + 1].partition(".")[0] in PACKAGES


if sys.argv[:1] == ["-m"] and _is_stage():  # what stands there while `python -m` looks for its module
    say_at_interrupt()
    end_at_sigterm()

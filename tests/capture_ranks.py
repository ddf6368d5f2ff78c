"""`torchrun -m tests.capture_ranks end|freeze RANK|all N FLAGS...`: capture.activations, of which that rank (or each) ends at
its N-th file operation, as a kill would end it, or stops there for ever.
"""

import os
import signal
import sys

from capture.activations import ActivationsConfig, run
from core import files
from core.cli import run_stage
from core.runtime import environment_rank
from tests.faults import do_at, exit_at

if __name__ == "__main__":
    how, rank, n = (sys.argv.pop(1) for _ in range(3))
    if rank in ("all", str(environment_rank()[0])):
        freeze = do_at(int(n), lambda: os.kill(os.getpid(), signal.SIGSTOP))
        files.before_operation = exit_at(int(n)) if how == "end" else freeze
    run_stage(ActivationsConfig, run, "")

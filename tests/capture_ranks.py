"""`torchrun -m tests.capture_ranks N RANK FLAGS...`: capture.activations, in which one rank ends at its N-th file operation, as
a kill would end it."""

import sys

from capture.activations import ActivationsConfig, run
from core import files
from core.cli import run_stage
from core.runtime import environment_rank
from tests.faults import exit_at

if __name__ == "__main__":
    at, rank = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    if environment_rank()[0] == rank:
        files.before_operation = exit_at(at)
    run_stage(ActivationsConfig, run, "")

"""`torchrun -m tests.capture_ranks N FLAGS...`: capture.activations, in which each rank ends at its N-th file operation, as a
kill would end it."""

import sys

from capture.activations import ActivationsConfig, run
from core import files
from core.cli import run_stage
from tests.faults import exit_at

if __name__ == "__main__":
    files.before_operation = exit_at(int(sys.argv.pop(1)))
    run_stage(ActivationsConfig, run, "")

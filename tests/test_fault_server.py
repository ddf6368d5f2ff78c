"""The fork server's ranks: what torchrun would start, without its start."""

import sys
import time
from pathlib import Path

from core.runtime import open_runtime
from tests.faults import ForkServer


def test_ranks_meet_and_are_ended_together(fork_server: ForkServer, tmp_path: Path) -> None:
    done = fork_server.ranks(3, "tests.test_fault_server", tmp_path, "all")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0 of 3", "1 of 3", "2 of 3"]
    assert done.stderr.count("a word\n") == 3
    began = time.monotonic()
    done = fork_server.ranks(2, "tests.test_fault_server", tmp_path, "one")
    assert done.returncode == 7
    done = fork_server.ranks(2, "tests.test_fault_server", tmp_path, "long", limit=0.5)
    assert done.returncode == 124
    assert time.monotonic() - began < 100


def main(folder: Path, who: str) -> None:
    if who == "long":
        time.sleep(600)
    with open_runtime("cpu", threads=1, timeout_s=60) as runtime:
        runtime.barrier()
        if who == "one":
            if runtime.rank == 1:
                sys.exit(7)
            time.sleep(600)
        (folder / f"{runtime.rank} of {runtime.world_size}").touch()
        print("a word", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

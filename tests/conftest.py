"""What all tests share: few threads, nothing that calls out, a launcher for several ranks, and no quiet skips in CI."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Set before torch is imported; processes started by tests inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLAMA3_SAE_SEEN", "")  # models of tests come and go
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")  # kernels without a GPU
os.environ.pop("LOG_TRACEBACKS", None)

import pytest

from core import files
from tests.faults import ForkServer

ROOT = Path(__file__).parent.parent

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch() -> Launch:
    """`launch("-m", "capture.sentences", "--out", folder, ranks=2)`: run Python in the repository's root, under torchrun where
    there are several ranks, and return the finished process with its output. More than `limit` seconds fail the test.
    """

    def run(*arguments: Any, ranks: int = 1, limit: float = 120, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        return subprocess.run(
            [sys.executable, *torchrun, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=limit,
        )

    return run


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder in memory where there is such a thing: fault loops fsync hundreds of times."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs functions in processes of their own, which may be killed at the n-th file operation or after some time."""
    with ForkServer(ROOT) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2's GGUF file, fetched once where it is not here; where it cannot be had, a test fails in one line."""
    from llama3.hub import locate

    try:
        return locate("smollm2")
    except ValueError as error:
        reason = str(error)
    pytest.fail(reason, pytrace=False)


@pytest.fixture(autouse=True)
def _no_fault_left_behind() -> Iterator[None]:
    """A test that injects faults must not harm the next one."""
    before = files.before_operation
    yield
    files.before_operation = before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]") -> Any:
    """CI installs Chromium, so there a test that skips for want of it has failed."""
    report = yield
    if os.environ.get("CI") and report.skipped and "chromium" in str(report.longrepr).lower():
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where Chromium must be installed: {report.longrepr}"
    return report

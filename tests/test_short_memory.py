"""Memory that runs out in any stage (`ulimit -v`): one line that says so, and a folder that the same command completes.

With a few MB left, Arrow and libraries in Rust may end the process themselves; nothing hangs, and nothing is lost then either.
"""

import importlib
import os
import re
import resource
import signal
import sys
from pathlib import Path

import pytest

from core.artifact import verify
from core.cli import one_line_errors, run_stage, set_up_logging
from core.ending import end_at_sigterm, lack_of_memory
from demo.corpus import passages
from tests.chain import chain
from tests.faults import ForkServer
from tests.tiny import tiny_llama
from tests.tiny_features import alone

MB = 2**20
EXTRA_MB = (0, 2, 16, 64)
"""What the stage may take beyond what its imports have taken."""

STAGES = {
    "capture.sentences": ("SentencesConfig", "--source documents.txt --out new"),
    "capture.activations": (
        "ActivationsConfig",
        "--model model --corpus corpus --chunk-sentences 64 --max-length 96 --out new",
    ),
    "sae.preprocess": ("PreprocessConfig", "--activations acts --batch-rows 256 --out new"),
    "sae.train": ("TrainConfig", "--batches batches --n-latents 64 --k 4 --batch-size 256 --max-steps 5 --wandb off --out new"),
    "sae.evaluate": ("EvaluateConfig", "--sae run/sae --model model --corpus corpus --out new"),
    "interpretability.top_sentences": (
        "TopSentencesConfig",
        "--sae run/sae --activations acts --model model --corpus corpus --n-sentences 5 --out new",
    ),
    "interpretability.explain": ("ExplainConfig", "run --top top --out new"),
    "inference.complete": ("CompleteConfig", "--model model --prompt the --max-new-tokens 8"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    tiny_llama(root / "model")
    texts = [document.text for document in passages() if document.label in ("war", "sea")]
    (root / "documents.txt").write_text("\n\n".join(texts))
    chain(str(root / "model"), root, root / "documents.txt", alone())
    return root


def stage_with(extra_mb: str, module: str, folder: str, said: str) -> None:
    """Run a stage in `folder` with so much memory; what it says on stderr goes to the file `said`."""
    name, flags = STAGES[module]
    stage = importlib.import_module(module)
    os.chdir(folder)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = [module, *flags.split(), "--device", "cpu", "--threads", "1"]
    end_at_sigterm()  # which a stage does before its imports, when nothing is short yet
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if int(extra_mb) >= 0:
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(extra_mb) * MB,) * 2)
    run_stage(getattr(stage, name), stage.run, "")


@pytest.mark.faults
@pytest.mark.parametrize("module", STAGES)
def test_a_stage_without_memory(root: Path, tmp_path: Path, fork_server: ForkServer, module: str) -> None:
    for name in ("model", "documents.txt", "corpus", "acts", "batches", "run", "top"):
        (tmp_path / name).symlink_to(root / name)
    said, codes = tmp_path / "said.txt", []
    for extra in EXTRA_MB:
        codes.append(fork_server.run(stage_with, extra, module, tmp_path, said))
        text = said.read_text()
        if codes[-1] == 2:
            assert "Traceback" not in text
            assert re.search(r"^error: .*memory.*\n\Z", text, re.MULTILINE), text
        elif codes[-1]:  # an allocation failed inside a library that then ends the process, or panics
            assert codes[-1] == -signal.SIGABRT or extra < 16, f"{extra} MB: {text}"
            assert re.search("bad_alloc|memory allocation of|MemoryError|SystemError", text), f"{extra} MB: {text}"
    assert 2 in codes or module == "inference.complete", "there the tokenizer, in Rust, is what needs most"
    assert codes[0] != 0, "the limit is felt"
    assert fork_server.run(stage_with, -1, module, tmp_path, said) == 0, said.read_text()
    if module != "inference.complete":
        verify(tmp_path / "new/sae" if module == "sae.train" else tmp_path / "new")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "an allocation failed"),
        (MemoryError("Unable to allocate 4.0 TiB for an array"), "Unable to allocate 4.0 TiB for an array"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 4 bytes. Error code 12 (Cannot allocate memory)\nException raised from alloc_cpu at ..."
            ),
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes. Error code 12 (Cannot allocate memory)",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."), "CUDA out of memory. Tried to allocate 2 GiB."),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
    ],
)
def test_a_lack_of_memory_is_one_line(error: Exception, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    with pytest.raises(SystemExit) as end, one_line_errors(rank=1):
        raise error
    assert end.value.code == 2
    line = f"error (rank 1): out of memory ({reason}); free some, lift the limit (`ulimit -v`), or ask for less at a time\n"
    assert capsys.readouterr().err == line


def test_other_errors_of_ours_stay_bugs() -> None:
    assert lack_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""
    with pytest.raises(RuntimeError), one_line_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

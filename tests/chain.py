"""All stages behind the corpus in one process group: what tests/test_chain.py starts with one process and with two.

torchrun --nproc_per_node=2 -m tests.chain MODEL OUT
"""

import sys
from pathlib import Path

from capture.activations import ActivationsConfig
from capture.activations import run as capture
from capture.sentences import SentencesConfig
from capture.sentences import run as cut
from core.cli import set_up_logging
from core.runtime import Runtime, Solo, open_runtime
from interpretability.top_sentences import TopSentencesConfig
from interpretability.top_sentences import run as find_top
from sae.evaluate import EvaluateConfig
from sae.evaluate import run as evaluate
from sae.preprocess import PreprocessConfig
from sae.preprocess import run as preprocess
from sae.train import TrainConfig
from sae.train import run as train


def chain(model: str, out: Path, source: Path, runtime: Runtime) -> None:
    """Text to top sentences below `out`, small: 64 latents, k = 4, 150 steps of 256 rows."""
    place = {"device": "cpu", "threads": 1}
    if runtime.is_main:
        solo = Runtime(0, 1, runtime.device, Solo())
        cut(SentencesConfig(source=str(source), out=out / "corpus", **place), solo)
    runtime.barrier()
    capture(
        ActivationsConfig(model=model, corpus=out / "corpus", out=out / "acts", chunk_sentences=64, max_length=96, **place),
        runtime,
    )
    preprocess(PreprocessConfig(activations=out / "acts", out=out / "batches", batch_rows=256, **place), runtime)
    shape = {"n_latents": 64, "k": 4, "batch_size": 256, "epochs": 20, "max_steps": 150, "lr": 3e-3, "warmup_steps": 10}
    train(TrainConfig(batches=out / "batches", out=out / "run", wandb="off", **shape, **place), runtime)
    evaluate(EvaluateConfig(sae=out / "run/sae", model=model, corpus=out / "corpus", out=out / "evaluation", **place), runtime)
    find_top(
        TopSentencesConfig(
            sae=out / "run/sae", activations=out / "acts", model=model, corpus=out / "corpus", out=out / "top", n=5, **place
        ),
        runtime,
    )


if __name__ == "__main__":
    set_up_logging()
    with open_runtime("cpu", threads=1) as runtime:
        chain(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), runtime)

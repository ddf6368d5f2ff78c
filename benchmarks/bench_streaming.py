"""Training while the model runs beside capture and training alone; two SAEs from one pass beside two passes.

    python -m benchmarks.bench_streaming --threads 2 --out streaming.json          # on an idle CPU
    python -m benchmarks.bench_streaming --device cuda --model M --n-latents 65536 --batch-size 8192

Whole stages are timed, in this process, on `demo/data/passages.jsonl` as often as `--copies` says. Each
round times all of them one after another; a ratio is the median over rounds. On a CPU streaming could at
best take as long as capture and training together, on a GPU as long as the slower of the two.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.table import machine_name
from capture.activations import ActivationsConfig
from capture.activations import run as capture
from capture.sentences import SentencesConfig
from capture.sentences import run as sentences
from core.runtime import Runtime, open_runtime
from sae.preprocess import PreprocessConfig
from sae.preprocess import run as preprocess
from sae.train import TrainConfig, run

PASSAGES = Path(__file__).parent.parent / "demo" / "data" / "passages.jsonl"
AT_LEAST, AT_MOST = 0.9, 0.8
"""Marks: share of what capture and training alone allow; one pass for two SAEs, of two passes."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured and where."""

    out: Path | None = None
    """JSON with every timing."""
    model: str = "demo"
    site: str = ""
    device: str = "cpu"
    threads: int = 0
    copies: int = 2
    """Times that the passages go into the corpus."""
    n_latents: int = 4096
    k: int = 32
    batch_size: int = 1024
    buffer_rows: int = 65_536
    rounds: int = 3


def main(config: BenchConfig) -> None:
    with open_runtime(config.device, config.threads) as runtime, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        for copy in range(config.copies):
            (folder / "text" / f"{copy}.jsonl").write_bytes(PASSAGES.read_bytes())
        sentences(SentencesConfig(source=str(folder / "text"), out=folder / "corpus"), runtime)
        times = [timed(config, runtime, folder, number) for number in range(config.rounds)]
    report(config, times)


def timed(config: BenchConfig, runtime: Runtime, folder: Path, number: int) -> dict[str, float]:
    """Seconds of each way, in folders of its own."""
    here = folder / str(number)
    here.mkdir()
    grid = here / "grid.toml"
    grid.write_text("[grid]\nseed = [0, 1]\n")
    rows: dict[str, Any] = {"model": config.model, "corpus": folder / "corpus"}
    flags: dict[str, Any] = {"n_latents": config.n_latents, "k": config.k, "wandb": "off"}
    flags |= {"batch_size": config.batch_size, "checkpoint_every": 0}
    stream = rows | flags | {"site": config.site, "buffer_rows": config.buffer_rows}
    sites = (config.site,) if config.site else ()
    acts, batches = here / "acts", here / "batches"
    return {
        "capture": seconds(lambda: capture(ActivationsConfig(**rows, out=acts, sites=sites), runtime), runtime),
        "preprocess": seconds(lambda: preprocess(PreprocessConfig(activations=acts, out=batches), runtime), runtime),
        "train": seconds(lambda: run(TrainConfig(batches=batches, out=here / "a", **flags), runtime), runtime),
        "streaming": seconds(lambda: run(TrainConfig(**stream, out=here / "b"), runtime), runtime),
        "two at once": seconds(lambda: run(TrainConfig(**stream, out=here / "c", runs=grid), runtime), runtime),
    }


def seconds(act: Callable[[], object], runtime: Runtime) -> float:
    began = time.monotonic()
    act()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    return time.monotonic() - began


def report(config: BenchConfig, times: list[dict[str, float]]) -> None:
    best: Callable[..., float] = max if config.device.startswith("cuda") else lambda *parts: sum(parts)
    ratios = {
        "of what capture and training allow": [best(one["capture"], one["train"]) / one["streaming"] for one in times],
        "of two passes": [one["two at once"] / (2 * one["streaming"]) for one in times],
    }
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    for name in times[0]:
        print(f"{name:12} {statistics.median(one[name] for one in times):8.2f} s")
    for (name, value), mark in zip(medians.items(), (f">= {AT_LEAST}", f"<= {AT_MOST}"), strict=True):
        print(f"{value:.2f} {name} ({mark} wanted)")
    if config.out:
        record = {"machine": machine_name(config.device.startswith("cuda")), "times": times, "ratios": ratios}
        config.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))

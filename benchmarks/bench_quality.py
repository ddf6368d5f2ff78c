"""What is left unexplained after equal tokens on equal rows: ours beside sparsify, SAELens and dictionary_learning.

    python -m benchmarks.bench_quality --batches batches/ --out runs/quality

Every library takes one pass over the same training rows in the same order, at its own defaults and at ours, with several seeds.
Then FVU is taken over the held-out rows, and a latent counts as dead that fires on none of the last training rows. Each run leaves
a JSON file in --out and is not done again; libraries that are not installed are left out and named. See benchmarks/requirements.txt.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.sae_peers import DictionaryLearning, SAELens, Setup, Sparsify
from core.runtime import Runtime, Solo
from sae.batches import Batches, Schedule
from sae.hyperparameters import Hyperparameters
from sae.trainer import Trainer

ROWS = 4096  # at a time, after training


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What is trained on what."""

    batches: Path
    """Folder written by sae.preprocess."""
    out: Path
    """Folder of results."""
    n: int = 2048
    k: int = 32
    batch: int = 1024
    seeds: int = 3
    steps: int = 0
    """0: one pass over the training rows."""
    dead_rows: int = 200_000
    """The last training rows, on which a latent that lives must fire."""
    only: tuple[str, ...] = ()
    """Names from the table to train; empty: all."""
    threads: int = 1


class Ours:
    """sae.train with its defaults: the trainer reads its own rows, which are those that the others are given."""

    def __init__(self, setup: Setup, batches: Batches) -> None:
        config = Hyperparameters(n_latents=setup.n, k=setup.k, batch_size=setup.batch, max_steps=setup.steps)
        self.trainer = Trainer(config, Runtime(0, 1, torch.device("cpu"), Solo()), batches, setup.seed)

    def step(self, x: Tensor) -> None:
        self.trainer.train_step()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        x_hat: Tensor = self.trainer.sae(x)
        return x_hat

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        values, indices = self.trainer.sae.encode(x)
        return torch.zeros(len(x), self.trainer.config.n_latents).scatter_(1, indices, values)


class Peer:
    """A library of benchmarks.sae_peers on rows times `scale`, the normalisation that it is used to."""

    def __init__(self, library: Any, encode: Callable[[Any, Tensor], Tensor], scale: float) -> None:
        self.library, self.encode, self.scale = library, encode, scale

    def step(self, x: Tensor) -> None:
        self.library.step(x * self.scale)

    def reconstruct(self, x: Tensor) -> Tensor:
        x_hat: Tensor = self.library.reconstruct(x * self.scale) / self.scale
        return x_hat

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        return self.encode(self.library, x * self.scale)


def _sparsify_latents(library: Any, z: Tensor) -> Tensor:
    out = library.sae.encode(z)
    return torch.zeros(len(z), library.setup.n).scatter_(1, out.top_indices, out.top_acts.float())


def contestants(batches: Batches) -> dict[str, Callable[[Setup], Any]]:
    """How each is made. At its defaults a library gets rows as it expects them: sparsify and SAELens raw ones (their default is no
    normalisation), dictionary_learning ones of unit mean square norm (its normalize_activations)."""
    theirs: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor]]] = {
        "sparsify": (Sparsify, _sparsify_latents),
        "SAELens": (SAELens, lambda library, z: library.trainer.sae.encode(z)),
        "dictionary_learning": (DictionaryLearning, lambda library, z: library.trainer.ae.encode(z)),
    }
    square = batches.statistics.total_variance("none") + float(batches.statistics.centre("none").square().sum())
    own_scale = {"sparsify": 1.0, "SAELens": 1.0, "dictionary_learning": square**-0.5}
    makers: dict[str, Callable[[Setup], Any]] = {"ours": lambda setup: Ours(setup, batches)}
    for name, (make, encode) in theirs.items():
        for defaults, how, scale in (
            (True, "its defaults", own_scale[name]),
            (False, "ours", batches.statistics.scale("dataset")),
        ):
            makers[f"{name}, {how}"] = lambda setup, make=make, encode=encode, defaults=defaults, scale=scale: Peer(
                make(setup, defaults), encode, scale
            )
    return makers


def blocks(rows: Any, start: int, stop: int, size: int) -> Iterator[Tensor]:
    for first in range(start, stop, size):
        yield rows.read(first, min(stop, first + size)).float()


def train_and_measure(config: QualityConfig, batches: Batches, make: Callable[[Setup], Any], seed: int) -> dict[str, float]:
    """One run: FVU over the held-out rows, share of latents dead on the last training rows, L0, seconds of training."""
    schedule = Schedule(len(batches.train), batches.batch_rows, config.batch, seed)
    steps = config.steps or schedule.steps_per_epoch
    contestant = make(
        Setup(
            d=batches.statistics.d_model,
            n=config.n,
            k=config.k,
            batch=config.batch,
            steps=steps,
            seed=seed,
            centre=batches.statistics.centre("dataset"),
        )
    )
    stop = min(steps * config.batch, len(batches.train))
    began = time.monotonic()
    for x in blocks(batches.train, 0, stop, config.batch):
        contestant.step(x)
    seconds = time.monotonic() - began
    missed, active, n_rows = 0.0, 0.0, len(batches.validation)
    for x in blocks(batches.validation, 0, n_rows, ROWS):
        missed += float((x - contestant.reconstruct(x)).double().square().sum())
        active += float((contestant.latents(x) > 0).sum())
    variance = total_variance(batches)
    fired = torch.zeros(config.n, dtype=torch.bool)
    for x in blocks(batches.train, max(0, stop - config.dead_rows), stop, ROWS):
        fired |= (contestant.latents(x) > 0).any(0)
    return {"fvu": missed / variance, "dead": 1 - float(fired.float().mean()), "l0": active / n_rows, "seconds": seconds}


def total_variance(batches: Batches) -> float:
    """sum ||x - mean||^2 over the held-out rows, with their own mean."""
    rows = batches.validation.read(0, len(batches.validation)).double()
    return float((rows - rows.mean(0)).square().sum())


def main(config: QualityConfig) -> None:
    torch.set_num_threads(config.threads)
    batches = Batches(config.batches)
    config.out.mkdir(parents=True, exist_ok=True)
    makers = {name: make for name, make in contestants(batches).items() if not config.only or name in config.only}
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(config.seeds):
        for name, make in makers.items():
            path = config.out / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"
            if not path.exists():
                try:
                    found = train_and_measure(config, batches, make, seed)
                except ImportError as error:
                    print(f"{name} is not installed ({error}); see benchmarks/requirements.txt")
                    continue
                path.write_text(json.dumps(found) + "\n", encoding="utf-8")
                print(f"seed {seed} {name}: {found}", flush=True)
            results.setdefault(name, []).append(json.loads(path.read_text(encoding="utf-8")))
    report(config, batches, results)


def report(config: QualityConfig, batches: Batches, results: dict[str, list[dict[str, float]]]) -> None:
    print(f"d {batches.statistics.d_model}, n {config.n}, k {config.k}, batch {config.batch}, {len(batches.train):,} training rows, "
          f"{len(batches.validation):,} held out, {config.seeds} seeds; mean and range")  # fmt: skip
    print(f"{'':<36}{'FVU':>8}{'range':>18}{'dead':>9}{'L0':>7}{'s':>7}")
    best = min(
        statistics.mean(run["fvu"] for run in runs) for name, runs in results.items() if name != "ours" or len(results) == 1
    )
    for name, runs in results.items():
        fvu, dead, l0, seconds = ([run[key] for run in runs] for key in ("fvu", "dead", "l0", "seconds"))
        mean = statistics.mean(fvu)
        mark = ""
        if name == "ours":
            met = "yes" if mean <= 1.01 * best and statistics.mean(dead) <= 0.01 else "NO"
            mark = f"   FVU <= 1.01 x {best:.4f} (best of the others), dead <= 1 %: {met}"
        print(f"{name:<36}{mean:>8.4f}{min(fvu):>9.4f}{max(fvu):>9.4f}{100 * statistics.mean(dead):>7.2f} %"
              f"{statistics.mean(l0):>7.1f}{statistics.median(seconds):>7.0f}{mark}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(QualityConfig, description=__doc__))

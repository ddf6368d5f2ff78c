"""What is left unexplained after equal tokens on equal rows: ours beside sparsify, SAELens and dictionary_learning.

    python -m benchmarks.bench_quality --batches batches/ --out runs/quality --plan     # the hours that it will take, no more
    python -m benchmarks.bench_quality --batches batches/ --out runs/quality

Every library starts from the same weights and takes the same rows in the same order, with our Adam and our schedule; what is left
is its own model, loss, clipping and AuxK. First each takes --search-rows at each of --rates; then its best rate runs over all
rows with --seeds seeds, and once at the library's own defaults. Each run leaves a JSON file with its curve in --out and is not
done again: kill it at any time and give the command again. Libraries that are not installed are left out and named: see
benchmarks/requirements.txt.
"""

import json
import math
import statistics
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

from benchmarks.quality_contestants import Contestant, Maker, at_defaults, tuned
from benchmarks.sae_peers import Setup
from sae.batches import Batches

ROWS = 4096  # at a time, after training
CURVE_ROWS = 8192  # held out, for a point of a curve
POINTS = 12  # of a curve
TIMED_STEPS = 3
BASE_RATE = 2.5e-4


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
    rates: tuple[float, ...] = tuple(BASE_RATE * 2**i for i in range(8))
    """Peak learning rates that every library tries."""
    search_rows: int = 200_000
    """Rows of a run of the search."""
    final_rows: int = 0
    """Rows of a final run; 0: all."""
    held_out_rows: int = 65_536
    """Rows that FVU is taken over, at most."""
    dead_rows: int = 200_000
    """The last training rows, on which a latent that lives must fire."""
    seeds: int = 3
    only: tuple[str, ...] = ()
    """Names from the table to train; empty: all."""
    plan: bool = False
    """Print what is to be done and the hours that it takes, and stop."""
    runs: int = 0
    """Stop after so many trainings; 0: when all are done. For a machine that is shared: others get their turn in between."""
    threads: int = 1


class Run(NamedTuple):
    """One training, and where its result lies."""

    name: str
    lr: float
    """0: the library's own."""
    rows: int
    seed: int

    def path(self, out: Path) -> Path:
        name = self.name.replace(", ", "-").replace(" ", "_")
        return out / f"{name}-{self.lr:g}-{self.rows}-{self.seed}.json"

    def result(self, out: Path) -> dict[str, Any] | None:
        path = self.path(out)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def blocks(rows: Any, start: int, stop: int, size: int) -> Iterator[Tensor]:
    for first in range(start, stop, size):
        yield rows.read(first, min(stop, first + size)).float()


def setup_of(config: QualityConfig, batches: Batches, run: Run) -> Setup:
    shape = {"d": batches.statistics.d_model, "n": config.n, "k": config.k, "batch": config.batch}
    centre = batches.statistics.centre("dataset")
    return Setup(**shape, steps=-(-run.rows // config.batch), seed=run.seed, lr=run.lr, centre=centre)


def train_and_measure(config: QualityConfig, batches: Batches, make: Maker, run: Run) -> dict[str, Any]:
    """FVU over held-out rows at the end and on the way, share of latents dead on the last training rows, L0, seconds."""
    setup = setup_of(config, batches, run)
    contestant = make(setup)
    every, curve, seconds = max(1, setup.steps // POINTS), [], 0.0
    for step, x in enumerate(blocks(batches.train, 0, run.rows, config.batch)):
        began = time.monotonic()
        contestant.step(x)
        seconds += time.monotonic() - began
        if (step + 1) % every == 0:
            curve.append([(step + 1) * config.batch, fvu_and_l0(contestant, batches, CURVE_ROWS)[0]])
    fvu, l0 = fvu_and_l0(contestant, batches, config.held_out_rows)
    fired = torch.zeros(config.n, dtype=torch.bool)
    for x in blocks(batches.train, max(0, run.rows - config.dead_rows), run.rows, ROWS):
        fired |= (contestant.latents(x) > 0).any(0)
    dead = 1 - float(fired.float().mean())
    return run._asdict() | {"fvu": fvu, "dead": dead, "l0": l0, "seconds": seconds, "curve": curve}


def fvu_and_l0(contestant: Contestant, batches: Batches, most: int) -> tuple[float, float]:
    """Over the first held-out rows: `sum ||x - x_hat||^2 / sum ||x - mean||^2`, the mean being their own."""
    n = min(most, len(batches.validation))
    missed, active, total = 0.0, 0.0, 0.0
    mean = batches.validation.read(0, n).double().mean(0)
    for x in blocks(batches.validation, 0, n, ROWS):
        missed += float((x - contestant.reconstruct(x)).double().square().sum())
        active += float((contestant.latents(x) > 0).sum())
        total += float((x - mean).square().sum())
    return missed / total, active / n


def installed(config: QualityConfig, batches: Batches, makers: dict[str, Maker]) -> dict[str, float]:
    """Seconds of a step of each contestant that can be made; those that cannot are named. Timed once for an --out."""
    path = config.out / "seconds.json"
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, make in makers.items():
        if name in found:
            continue
        try:
            contestant = make(setup_of(config, batches, Run(name, 0.0, config.search_rows, 0)))
        except ImportError as error:
            print(f"{name} is not installed ({error}); see benchmarks/requirements.txt")
            continue
        times = []
        for x in blocks(batches.train, 0, TIMED_STEPS * config.batch, config.batch):
            began = time.monotonic()
            contestant.step(x)
            times.append(time.monotonic() - began)
        found[name] = statistics.median(times)
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return {name: found[name] for name in makers if name in found and (not config.only or name in config.only)}


def best_rate(config: QualityConfig, name: str) -> float | None:
    """Of the search; None while it is not finished."""
    found = {rate: Run(name, rate, config.search_rows, 0).result(config.out) for rate in config.rates}
    results = {rate: result["fvu"] for rate, result in found.items() if result is not None}
    return min(results, key=lambda rate: results[rate]) if len(results) == len(found) else None


def finals(config: QualityConfig, batches: Batches, name: str, own: bool) -> list[Run]:
    """The full runs of a contestant; none while its rate is not known."""
    rows = min(config.final_rows or len(batches.train), len(batches.train))
    rate = 0.0 if own else best_rate(config, name)
    return [] if rate is None else [Run(name, rate, rows, seed) for seed in range(1 if own else config.seeds)]


def finals_of_seed(
    config: QualityConfig, batches: Batches, names: Iterable[str], theirs: Container[str], seed: int
) -> Iterator[Run]:
    """Every library's run with this seed, before anyone's with the next: what is not finished is still comparable."""
    for name in names:
        yield from finals(config, batches, name, name in theirs)[seed : seed + 1]


def main(config: QualityConfig) -> None:
    torch.set_num_threads(config.threads)
    batches = Batches(config.batches)
    config.out.mkdir(parents=True, exist_ok=True)
    ours, theirs = tuned(batches), at_defaults(batches)
    makers = ours | theirs
    seconds = installed(config, batches, makers)
    middle = math.log(statistics.median(config.rates))
    outwards = sorted(config.rates, key=lambda rate: abs(math.log(rate) - middle))  # what is likely to win comes first
    search = [Run(name, rate, config.search_rows, 0) for rate, name in product(outwards, seconds) if name in ours]
    rows = min(config.final_rows or len(batches.train), len(batches.train))
    announce(config, seconds, search, {name: rows * (1 if name in theirs else config.seeds) for name in seconds})
    done = 0
    last = (run for seed in range(config.seeds) for run in finals_of_seed(config, batches, seconds, theirs, seed))
    for run in chain(search, last):
        if config.plan or 0 < config.runs <= done:
            break
        done += perform(config, batches, makers[run.name], run)
    report(config, batches, {name: finals(config, batches, name, name in theirs) for name in seconds})


def announce(config: QualityConfig, seconds: dict[str, float], search: list[Run], final_rows: dict[str, int]) -> None:
    """Hours of what is not done yet; of the final runs, all that there will be."""
    left = [run for run in search if run.result(config.out) is None]
    to_search = sum(run.rows * seconds[run.name] for run in left) / config.batch / 3600
    to_finish = sum(rows * seconds[name] for name, rows in final_rows.items()) / config.batch / 3600
    for name, each in seconds.items():
        print(f"{name:<32}{1000 * each:>8.0f} ms a step")
    print(
        f"{len(left)} runs of the search are left, about {to_search:.1f} hours; the final runs take about {to_finish:.1f} hours",
        flush=True,
    )


def perform(config: QualityConfig, batches: Batches, make: Maker, run: Run) -> bool:
    """Whether there was anything left to do."""
    if run.result(config.out) is not None:
        return False
    found = train_and_measure(config, batches, make, run)
    path = run.path(config.out)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
    temporary.rename(path)
    print(f"{run}: FVU {found['fvu']:.4f}, dead {found['dead']:.2%}, {found['seconds']:.0f} s", flush=True)
    return True


def report(config: QualityConfig, batches: Batches, runs: dict[str, list[Run]]) -> None:
    """Two tables in Markdown: the search, then the final runs that are done."""
    print(
        f"d {batches.statistics.d_model}, n {config.n}, k {config.k}, batch {config.batch}, {len(batches.train):,} training rows"
    )
    print(f"\n| {config.search_rows:,} rows | " + " | ".join(f"{rate:g}" for rate in config.rates) + " |")
    print("|---" * (1 + len(config.rates)) + "|")
    for name in runs:
        found = [Run(name, rate, config.search_rows, 0).result(config.out) for rate in config.rates]
        if any(found):
            print(f"| {name} | " + " | ".join(f"{result['fvu']:.4f}" if result else "" for result in found) + " |")
    print("\n| final | rate | FVU | range | dead | L0 | runs |\n|---|---|---|---|---|---|---|")
    for name, of_name in runs.items():
        done = [result for run in of_name if (result := run.result(config.out)) is not None]
        if done:
            fvu, dead, l0 = ([result[key] for result in done] for key in ("fvu", "dead", "l0"))
            print(f"| {name} | {done[0]['lr']:g} | {statistics.mean(fvu):.4f} | {min(fvu):.4f} to {max(fvu):.4f} "
                  f"| {statistics.mean(dead):.2%} | {statistics.mean(l0):.1f} | {len(done)} |")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(QualityConfig, description=__doc__))

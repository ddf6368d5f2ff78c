"""The pass for top sentences beside the encoder's product and the reference run's method; its memory; batches that fail.

    python -m benchmarks.bench_interpretability --out interpretability.json
    python -m benchmarks.bench_interpretability --measures speed memory --threads 2

Speeds are medians of ratios of neighbouring timings, so that a machine that slows down slows both. Rows are random: every token
fires k latents, and sentences of few repeats fill the tables as no real text does. Prints a table and writes JSON.
"""

import heapq
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from capture.store import Chunk
from interpretability.prompts import MalformedReply, parse
from interpretability.records import AGGREGATIONS
from interpretability.selection import LatentTotals, Ragged, Sentences, TopTable, pairs_of
from interpretability.top_sentences import encode_chunk, usable_tokens
from sae.model import SAE, SAEConfig

CPU = torch.device("cpu")
SHAPES = {"demo": (256, 4096, 32, 2048), "wide": (1024, 16_384, 64, 256)}
"""d_model, n_latents, k, sentences of a chunk."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured."""

    out: Path = Path("bench_interpretability.json")
    """JSON with every number of the table."""
    measures: tuple[str, ...] = ("speed", "memory", "batches", "malformed")
    """Some of: speed, memory, batches, malformed."""
    rounds: int = 5
    """Pairs of timings."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""


class Row(NamedTuple):
    """A line of the table."""

    measure: str
    found: float
    reach: str
    reached: bool
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.measure:<66} {self.found:>10,.4g}  {self.reach:<12} {'yes' if self.reached else 'NO'}  {self.detail}"


def random_sae(d: int, n: int, k: int) -> SAE:
    torch.manual_seed(0)
    return SAE(SAEConfig(d_model=d, n_latents=n, k=k)).requires_grad_(False)


def random_chunk(index: int, d: int, n_sentences: int, shortest: int = 5, longest: int = 40) -> Chunk:
    generator = torch.Generator().manual_seed(index)
    lengths = torch.randint(shortest, longest + 1, (n_sentences,), generator=generator)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rows = torch.randn(int(offsets[-1]), d, generator=generator).bfloat16()
    ids = torch.arange(n_sentences) + index * n_sentences
    return Chunk(index, rows, torch.zeros(len(rows), dtype=torch.int32), ids, torch.zeros_like(ids), offsets)


class Pass:
    """The work of the stage on one chunk after another, without the folders."""

    def __init__(self, sae: SAE, n: int) -> None:
        self.sae = sae
        self.table = TopTable(sae.cfg.n_latents, n, AGGREGATIONS, CPU, n_level=2)
        self.totals = LatentTotals(sae.cfg.n_latents, CPU)

    def add(self, chunk: Chunk) -> None:
        keep = usable_tokens(chunk, float("inf"))
        sentences = Sentences(chunk.sentence_ids, chunk.document_ids, Ragged(chunk.token_ids, chunk.offsets))
        hits = encode_chunk(self.sae, chunk, keep, CPU)
        pairs = pairs_of(hits, sentences, AGGREGATIONS)
        self.totals.add(hits, pairs, int(keep.sum()))
        self.table.add(pairs, sentences)


@torch.inference_mode()
def product(sae: SAE, chunk: Chunk) -> None:
    """The SAE's forward product alone on the rows of a chunk, in blocks as `encode` takes them."""
    for rows in torch.split(sae.normalise(chunk.activations).z, max(1, (1 << 24) // sae.cfg.n_latents)):
        sae.pre_activations(rows)


@torch.inference_mode()
def reference_method(sae: SAE, chunk: Chunk, heaps: list[list[tuple[float, int]]], n_sentences: int) -> int:
    """What the reference run does: a dense row a token, a sentence at a time, its mean credited to its largest latent alone.

    Returns the tokens of the `n_sentences` that it looks at.
    """
    for i in range(n_sentences):
        first, last = int(chunk.offsets[i]), int(chunk.offsets[i + 1])
        z = sae.normalise(chunk.activations[first:last]).z
        values, indices = sae.pre_activations(z).topk(sae.cfg.k)
        dense = torch.zeros(last - first, sae.cfg.n_latents).scatter_(1, indices, values.relu())
        mean = dense.mean(0)
        latent = int(mean.argmax())
        heapq.heappush(heaps[latent], (float(mean[latent]), i))
        if len(heaps[latent]) > 50:
            heapq.heappop(heaps[latent])
    return int(chunk.offsets[n_sentences])


def seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def speed(config: BenchConfig) -> Iterator[Row]:
    """Tokens a second beside the product alone, and beside the reference run's method, in interleaved rounds."""
    for name, (d, n, k, n_sentences) in SHAPES.items():
        sae = random_sae(d, n, k)
        ratios, against, rates = [], [], []
        heaps: list[list[tuple[float, int]]] = [[] for _ in range(n)]
        work = Pass(sae, 50)
        for i in range(config.rounds + 1):
            chunk = random_chunk(i, d, n_sentences)
            few = n_sentences // 16
            alone = seconds(lambda: product(sae, chunk))  # noqa: B023
            ours = seconds(lambda: work.add(chunk))  # noqa: B023
            theirs = seconds(lambda: reference_method(sae, chunk, heaps, few))  # noqa: B023
            if i:  # the first round warms up
                tokens, seen = len(chunk.activations), int(chunk.offsets[few])
                ratios.append(alone / ours)
                against.append((theirs / seen) / (ours / tokens))
                rates.append(tokens / ours)
        shape = f"{name}: d {d}, {n:,} latents, k {k}"
        rate = f"{statistics.median(rates):,.0f} tokens/s, rounds {min(ratios):.2f} to {max(ratios):.2f}"
        ratio, factor = statistics.median(ratios), statistics.median(against)
        yield Row(f"pass / product alone, tokens/s ({shape})", ratio, ">= 0.6", ratio >= 0.6, rate)
        spread = f"rounds {min(against):.1f} to {max(against):.1f}"
        yield Row(f"pass / reference run's method ({shape})", factor, ">= 20", factor >= 20, spread)


def resident(name: str) -> int:
    """KiB of this process in memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory_child() -> None:
    """Peak of this process beyond an SAE of 65,536 latents, with tables full for 50 sentences and 3 aggregations."""
    sae = random_sae(32, 65_536, 64)
    product(sae, random_chunk(0, 32, 2048, 5, 5))  # libraries, and the blocks of pre-activations that any encoder needs
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    work = Pass(sae, 50)
    for i in range(26):
        work.add(random_chunk(i, 32, 2048, 5, 5))
    work.table.merge()
    peak = resident("VmHWM")
    full = [float((work.table._least[a] > 0).float().mean()) for a in range(len(AGGREGATIONS))]
    print(json.dumps({"gib": (peak - before) / 2**20, "pairs": sum(b.n for b in work.table.blocks), "full": full}))


def memory(config: BenchConfig) -> Iterator[Row]:
    command = [sys.executable, "-c", "from benchmarks.bench_interpretability import memory_child; memory_child()"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    detail = f"{found['pairs']:,} pairs; latents with a full list: {', '.join(f'{share:.0%}' for share in found['full'])}"
    yield Row("peak beyond the SAE, GiB (65,536 latents x 50 x 3, and levels)", found["gib"], "<= 1", found["gib"] <= 1, detail)


def batches(config: BenchConfig) -> Iterator[Row]:
    """10,000 requests through a server that fails, the client killed 50 times."""
    from tests.fake_batches import BatchServer
    from tests.faults import ForkServer
    from tests.test_message_batches import check_accounts, faulty_run

    n, began = 10_000, time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        ForkServer(Path(__file__).parent.parent) as fork_server,
        BatchServer(seed=4, faults=0.1, expired=0.2, hang_s=0.8) as server,
    ):
        out = Path(folder) / "out"
        killed = faulty_run(out, server, fork_server, n=n, size=200, kills=50, seed=4)
        check_accounts(out, server, n)
        finals = len((out / "replies.txt").read_text().splitlines())
        detail = f"{killed} kills, {len(server.batches)} batches, faults {dict(server.injected)}, {time.perf_counter() - began:.0f} s"
        doubled = sum(count - 1 for count in server.prefixes().values())
    yield Row("final records of 10,000 requests", finals, "= 10,000", finals == n and killed == 50, detail)
    yield Row("batches created twice", doubled, "= 0", doubled == 0)


def malformed(config: BenchConfig) -> Iterator[Row]:
    from tests.test_prompts import malformed as replies

    valid, reasons = 0, set()
    for text in replies(1000):
        try:
            parse("semantic", text)
            valid += 1
        except MalformedReply as error:
            reasons.add(str(error)[:30])
    yield Row("malformed replies of 1,000 taken as valid", valid, "= 0", valid == 0, f"{len(reasons)} different reasons")


def main(config: BenchConfig) -> None:
    """Measure, print and write."""
    if config.threads:
        torch.set_num_threads(config.threads)
    measures = {"speed": speed, "memory": memory, "batches": batches, "malformed": malformed}
    rows: list[Row] = []
    for name in config.measures:
        if name not in measures:
            raise SystemExit(f"error: unknown measure {name!r}; expected some of {', '.join(measures)}")
        for row in measures[name](config):
            print(row, flush=True)
            rows.append(row)
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    config.out.write_text(json.dumps(about | {"rows": [row._asdict() for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))

"""The pass for top sentences beside the encoder's product and the reference run's method; its memory; batches that fail.

    python -m benchmarks.bench_interpretability --out interpretability.json
    python -m benchmarks.bench_interpretability --measures speed memory --threads 2
    python -m benchmarks.bench_interpretability --measures speed --shapes reference --device cuda

Speeds are medians of ratios of neighbouring timings, so that a machine that slows down slows both; "all" is the ratio of the sums,
with the merges of tables that are still filling. Rows are random: every token fires k latents, and sentences of few repeats fill
the tables as no real text does. Prints a table and writes JSON.

The reference run's method needs the encoder's product too, and its dense decoder besides, so no pass that computes every latent
can beat it by more than (its time) / (the product alone): that bound stands beside the ratio.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro

from benchmarks.table import machine_name, publish, said, seconds
from capture.store import Chunk
from interpretability.evidence.selection import LatentTotals, Ragged, Sentences, TopTable, pairs_of
from interpretability.labels.prompts import MalformedReply, parse
from interpretability.records import AGGREGATIONS
from interpretability.top_sentences import encode_chunk, parts_of, usable_tokens
from sae.model import CPU_ELEMENTS, GPU_ELEMENTS, SAE, SAEConfig

CPU = torch.device("cpu")
SHAPES = {"demo": (256, 4096, 32, 2048), "wide": (1024, 16_384, 64, 256), "reference": (3072, 65_536, 64, 48)}
"""d_model, n_latents, k, sentences of a chunk. reference: the size of the reference run's SAE, minutes on a small CPU."""
WARM_UP = 3
"""Chunks before the first timing: they fill the tables, as the first few thousand sentences of a corpus do."""
REFERENCE_BATCH = 128
"""Sentences that the reference run encodes at once."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured."""

    out: Path = Path("bench_interpretability.json")
    """JSON with every number of the table."""
    measures: tuple[str, ...] = ("speed", "memory", "batches", "malformed")
    """Some of: speed, memory, batches, malformed."""
    rounds: int = 5
    """Pairs of timings."""
    shapes: tuple[str, ...] = ("demo", "wide")
    """speed: some of demo, wide, reference."""
    device: str = "cpu"
    """speed: where the pass runs."""
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
        return f"{self.measure:<66} {self.found:>10,.4g}  {self.reach:<12} {said(self.reached):<3} {self.detail}"


HEADER = f"{'measure':<66} {'found':>10}  {'to reach':<12} reached"


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

    def __init__(self, sae: SAE, n: int, device: torch.device = CPU) -> None:
        self.sae, self.device = sae, device
        self.table = TopTable(sae.cfg.n_latents, n, AGGREGATIONS, device, n_level=2)
        self.totals = LatentTotals(sae.cfg.n_latents, device)

    def add(self, chunk: Chunk) -> None:
        for part in parts_of(chunk):
            keep = usable_tokens(part, float("inf"), has_sink=False)
            sentences = Sentences(part.sentence_ids, part.document_ids, Ragged(part.token_ids, part.offsets))
            hits = encode_chunk(self.sae, part, keep, self.device)
            pairs = pairs_of(hits, sentences.to(self.device), AGGREGATIONS)
            self.totals.add(hits, pairs, int(keep.sum()))
            self.table.add(pairs, sentences)


@torch.inference_mode()
def product(sae: SAE, chunk: Chunk, device: torch.device) -> None:
    """The product that the pass itself uses, alone, on the rows of a chunk and in the same blocks."""
    z = sae.normalise(chunk.activations.to(device)).z
    for rows in torch.split(z, max(1, (CPU_ELEMENTS if device == CPU else GPU_ELEMENTS) // sae.cfg.n_latents)):
        sae.pre_activations(rows)


Tops = tuple[defaultdict[int, list[tuple[float, int]]], ...]


@torch.inference_mode()
def reference_method(sae: SAE, chunk: Chunk, tops: Tops, n_sentences: int, device: torch.device) -> None:
    """What the reference run does with the first `n_sentences` (capture_top_activating_sentences.py): batches of 128 through
    encoder and decoder, a dense row a token, then a sentence at a time in Python, credited to its largest latent alone."""
    for begin in range(0, n_sentences, REFERENCE_BATCH):
        end = min(begin + REFERENCE_BATCH, n_sentences)
        first = int(chunk.offsets[begin])
        x = chunk.activations[first : int(chunk.offsets[end])].to(device)
        h = F.linear(sae.normalise(x).z - sae.b_pre, sae.W_enc, sae.b_enc)
        values, indices = h.topk(sae.cfg.k)
        dense = torch.zeros_like(h).scatter_(1, indices, values.relu())
        F.linear(dense, sae.W_dec.T) + sae.b_pre  # its forward pass reconstructs, though nothing reads that here
        for i in range(begin, end):
            of_sentence = dense[int(chunk.offsets[i]) - first : int(chunk.offsets[i + 1]) - first]
            for top, score in zip(tops, (of_sentence.mean(0), of_sentence.amax(0), of_sentence[-1]), strict=True):
                value, latent = torch.max(score, 0)
                held = top[int(latent)]
                if len(held) < 50 or float(value) > held[0][0]:
                    held[:] = sorted([*held[len(held) == 50 :], (float(value), i)])


def speed(config: BenchConfig) -> Iterator[Row]:
    """Tokens a second beside the product alone, and beside the reference run's method, in interleaved rounds."""
    for name in config.shapes:
        yield from speed_of(name, *SHAPES[name], rounds=config.rounds, device=torch.device(config.device))


def speed_of(name: str, d: int, n: int, k: int, n_sentences: int, rounds: int, device: torch.device) -> Iterator[Row]:
    sae = random_sae(d, n, k).to(device)
    work, tops = Pass(sae, 50, device), (defaultdict(list), defaultdict(list), defaultdict(list))
    few = min(n_sentences, max(REFERENCE_BATCH, n_sentences // 8))
    ratios, against, bounds, rates, both = [], [], [], [], [0.0, 0.0]
    for i in range(WARM_UP):
        work.add(random_chunk(i, d, n_sentences))
    for i in range(rounds + 1):
        chunk = random_chunk(WARM_UP + i, d, n_sentences)
        alone = seconds(lambda: product(sae, chunk, device))  # noqa: B023
        ours = seconds(lambda: work.add(chunk))  # noqa: B023
        theirs = seconds(lambda: reference_method(sae, chunk, tops, few, device))  # noqa: B023
        if i:  # the first round warms up
            tokens = len(chunk.activations)
            theirs *= tokens / int(chunk.offsets[few])
            ratios.append(alone / ours)
            against.append(theirs / ours)
            bounds.append(theirs / alone)
            rates.append(tokens / ours)
            both = [both[0] + alone, both[1] + ours]
    shape = f"{name}: d {d}, {n:,} latents, k {k}"
    rate = (
        f"{statistics.median(rates):,.0f} tokens/s, rounds {min(ratios):.2f} to {max(ratios):.2f}, all {both[0] / both[1]:.2f}"
    )
    ratio, factor = statistics.median(ratios), statistics.median(against)
    yield Row(f"pass / product alone, tokens/s ({shape})", ratio, ">= 0.6", ratio >= 0.6, rate)
    spread = f"rounds {min(against):.1f} to {max(against):.1f}; bound {statistics.median(bounds):.1f}"
    yield Row(f"pass / reference run's method ({shape})", factor, ">= 20", factor >= 20, spread)


def resident(name: str) -> int:
    """KiB of this process in memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory_child() -> None:
    """Peak of this process beyond an SAE of 65,536 latents, with tables full for 50 sentences and 3 aggregations."""
    sae = random_sae(32, 65_536, 64)
    product(sae, random_chunk(0, 32, 2048, 5, 5), CPU)  # libraries, and the blocks of pre-activations that any encoder needs
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
    for name in config.measures:
        if name not in measures:
            raise SystemExit(f"error: unknown measure {name!r}; expected some of {', '.join(measures)}")
    rows = (row for name in config.measures for row in measures[name](config))
    publish(rows, config.out, config, HEADER, device=machine_name(config.device == "cuda"))


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))

"""A training step of ours beside the encoder's forward product alone, the dense step, and three libraries; pairs, in one run.

    python -m benchmarks.bench_sae --dead 0                            # nothing dead; likewise 0.01 and 0.4
    python -m benchmarks.bench_sae --dead 0.01 --d 3072 --n 65536 --k 64 --batch 8192 --device cuda      # benchmarks/gpu.sh

In each round everything is timed once, one after another, so that a machine that slows down slows all; a ratio is the median over
rounds of neighbouring timings, with its quartiles. Libraries that are not installed are left out and named.
"""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.sae_peers import DenseStep, DictionaryLearning, Library, Ours, SAELens, Setup, Sparsify
from core.product import linear
from sae.model import CPU_ELEMENTS

REACH = {
    ("cpu", 512, 16_384, 32, 2048): {
        "product, PyTorch": 1.8,
        "product, fastest": 1.8,
        "dense step": 4.0,
        "sparsify": 1.5,
        "SAELens": 5.0,
        "dictionary_learning": 5.0,
        "memory": 3.0,
    },
    ("cuda", 3072, 65_536, 64, 8192): {"dense step": 6.0, "sparsify": 2.0, "activations/s": 450_000.0, "memory": 3.0},
}
"""Marks of device, d, n, k and batch: at most for a product and for memory, at least for the others."""
PEAK = 8192  # edge of the square bfloat16 product that gives the GPU's matrix rate


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured and where."""

    out: Path | None = None
    """JSON with every timing."""
    d: int = 512
    n: int = 16_384
    k: int = 32
    batch: int = 2048
    dead: float = 0.0
    """Share of the latents that count as dead: AuxK is off at 0."""
    rounds: int = 15
    device: str = "cpu"
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""
    only: tuple[str, ...] = ()
    """Names from the table to time besides ours; empty: all."""


class Timed:
    """Something run once a round, with what it took."""

    def __init__(self, name: str, run: Callable[[], object]) -> None:
        self.name, self.run, self.seconds = name, run, list[float]()


@torch.no_grad()
def products(z: Tensor, W: Tensor, b: Tensor) -> list[Timed]:
    """The encoder's forward product: as PyTorch computes it, and the fastest way known on this machine."""
    on_cpu = z.device.type == "cpu"
    fast = (z, W, b) if on_cpu else (z.bfloat16(), W.bfloat16(), b.bfloat16())
    blocks = torch.split(fast[0], max(1, CPU_ELEMENTS // len(W)) if on_cpu else len(z))
    timed = [
        Timed("product, PyTorch", torch.no_grad()(lambda: F.linear(z, W, b))),
        Timed("product, fastest", torch.no_grad()(lambda: [linear(block, *fast[1:]) for block in blocks])),
    ]
    if not on_cpu:
        square = torch.randn(PEAK, PEAK, device=z.device, dtype=torch.bfloat16)
        timed.append(Timed("matrix rate", lambda: square @ square))
    return timed


def libraries(setup: Setup, only: tuple[str, ...]) -> dict[str, Library]:
    """Those asked for that are installed."""
    found: dict[str, Library] = {"ours": Ours(setup)}
    others: dict[str, Callable[[Setup], Library]] = {
        "dense step": DenseStep,
        "sparsify": Sparsify,
        "SAELens": SAELens,
        "dictionary_learning": DictionaryLearning,
    }
    if setup.device != "cpu":
        others |= {"dense step, bf16": partial(DenseStep, autocast=True)}
    for name, make in others.items():
        if only and name not in only:
            continue
        try:
            found[name] = make(setup)
        except ImportError as error:
            print(f"{name} is not installed ({error}); see benchmarks/requirements.txt")
    return found


def measure(timed: list[Timed], rounds: int, device: str) -> None:
    for round_ in range(-2, rounds):  # two rounds to warm up
        for item in timed:
            start = time.perf_counter()
            item.run()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_ >= 0:
                item.seconds.append(time.perf_counter() - start)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Memory that `run` takes beyond what is held before and after it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return 0
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps left in the allocator would hide what this one takes

    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(text.split(f"{name}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def main(config: BenchConfig) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    setup = Setup(d=config.d, n=config.n, k=config.k, batch=config.batch, device=config.device)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(config.batch, config.d, generator=generator).to(config.device)
    dead = torch.randperm(config.n, generator=generator)[: round(config.dead * config.n)].sort().values.to(config.device)
    found = libraries(setup, config.only)
    ours = found["ours"]
    assert isinstance(ours, Ours)

    def step(library: Library) -> Callable[[], None]:
        def run() -> None:
            library.set_dead(dead)
            library.step(z)

        return run

    timed = [Timed(name, step(library)) for name, library in found.items()]
    timed[1:1] = products(z, ours.sae.W_enc.detach(), ours.sae.b_enc.detach())
    if config.only:
        timed = [item for item in timed if item.name in ("ours", *config.only)]
    measure(timed, config.rounds, config.device)
    extra = peak_bytes(timed[0].run, config.device)
    report(config, timed, extra)


def report(config: BenchConfig, timed: list[Timed], extra: int) -> None:
    mine, reach = timed[0].seconds, REACH.get((config.device, config.d, config.n, config.k, config.batch), {})
    print(f"d {config.d}, n {config.n}, k {config.k}, batch {config.batch}, {100 * config.dead:g} % dead, {config.rounds} rounds, "
          f"{config.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    print(f"{'':<22}{'ms':>9}{'ratio':>8}{'quartiles':>16}   reach")
    for item in timed:
        ms = 1e3 * statistics.median(item.seconds)
        if item.name == "ours":
            print(f"{item.name:<22}{ms:>9.1f}")
            continue
        if item.name == "matrix rate":
            print(f"{item.name:<22}{ms:>9.1f}   {2 * PEAK**3 / ms / 1e9:,.0f} TFLOP/s in bfloat16")
            continue
        is_product = item.name.startswith("product")
        ratios = [a / b if is_product else b / a for a, b in zip(mine, item.seconds, strict=True)]
        ratio, (low, _, high) = statistics.median(ratios), statistics.quantiles(ratios, n=4)
        mark = ""
        if item.name in reach and not (is_product and config.dead):
            wanted = reach[item.name]
            met = ratio <= wanted if is_product else ratio >= wanted
            mark = f"{'<=' if is_product else '>='} {wanted:g}: {'yes' if met else 'NO'}"
        print(f"{item.name:<22}{ms:>9.1f}{ratio:>8.2f}{low:>8.2f}{high:>8.2f}   {mark}")
    rate = config.batch / statistics.median(mine)
    tensors = extra / (2 * config.batch * config.n)
    marks = {"activations/s": rate >= reach.get("activations/s", 0), "memory": tensors <= reach.get("memory", 0)}
    judged = {name: f" ({reach[name]:,g}: {'yes' if met else 'NO'})" if name in reach else "" for name, met in marks.items()}
    print(f"{rate:,.0f} activations/s{judged['activations/s']}; memory beyond weights and optimizer: {extra / 2**20:,.0f} MiB = "
          f"{tensors:.2f} tensors [batch, n] in bf16{judged['memory']}")  # fmt: skip
    if config.out:
        settings = {name: str(value) for name, value in asdict(config).items()}
        result = {"config": settings, "seconds": {item.name: item.seconds for item in timed}, "extra_bytes": extra}
        config.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))

"""What a training run will need, before it starts: memory of a rank, disk, hours; and the flag to turn where it will not fit.

docs/scaling.md has the arithmetic.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from core.product import linear
from core.runtime import Runtime
from sae.hyperparameters import Hyperparameters
from sae.memory import Memory, Share, memory_of_rank

GIB = 2**30
PROBE_ROWS = 256


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank, bytes of the run's folder, seconds of the whole run, and what of it does not fit."""

    steps: int
    memory: Memory
    memory_free: int
    disk: int
    disk_free: int
    seconds: float
    """Lower bound: the encoder's forward product alone, at the speed measured here, times 2."""
    advice: str
    notes: tuple[str, ...] = ()
    """Lines of their own: on flags that the run never comes to, and on where the rows come from."""

    def text(self) -> str:
        """One line for each need, and what to turn."""
        lines = [
            f"steps   {self.steps:,}",
            f"memory  {gib(sum(self.memory))} per rank: {gib(self.memory.held)} weights and moments, "
            f"{gib(self.memory.step)} at the peak of a step; {gib(self.memory_free)} free",
            f"disk    {gib(self.disk)} for checkpoints and the SAE; {gib(self.disk_free)} free",
            f"time    about {self.seconds / 3600:,.1f} h at twice the time of the encoder's product measured here",
            *self.notes,
            self.advice or "it fits",
        ]
        return "\n".join(lines)


class Amount(NamedTuple):
    """What there is to learn from."""

    width: int
    rows: int
    """An epoch."""


class Rows(Protocol):
    """Where the rows of all runs come from, as far as plans go."""

    def amount(self, site: str) -> Amount: ...

    def plan(self, runs: Sequence[Any], plan: Plan) -> Plan:
        """With what getting the rows needs besides the training."""


def describe(runs: Sequence[Any], rows: Rows, runtime: Runtime) -> str:
    """The needs of runs that go over their rows together: all are held, and step one after the other."""
    plans = [plan(one, rows.amount(one.site), runtime, one.latent_parallel, one.out, one.keep) for one in runs]
    first = plans[0]
    held, step = sum(part.memory.held for part in plans), max(part.memory.step for part in plans)
    together = replace(
        first,
        steps=max(part.steps for part in plans),
        memory=Memory(held, step),
        disk=sum(part.disk for part in plans),
        seconds=sum(part.seconds for part in plans),
        advice="; ".join(dict.fromkeys(part.advice for part in plans if part.advice)),
        notes=tuple(dict.fromkeys(note for part in plans for note in part.notes)),
    )
    if len(plans) > 1 and not together.advice and held + step > first.memory_free:
        together = replace(together, advice=f"memory does not fit: {len(plans)} runs at once are too many; split --runs")
    return rows.plan(runs, together).text()


def plan(config: Hyperparameters, amount: Amount, runtime: Runtime, latent: int, out: Path, keep: int) -> Plan:
    """Predict the run of `config` on so many rows, with `latent` ranks sharing the latents, into the folder `out`."""
    d, size = amount.width, torch.finfo(getattr(torch, config.dtype)).bits // 8
    data = runtime.world_size // latent
    rows = min(config.batch_size, amount.rows) // data
    memory = memory_of_rank(config, Share(config.n_latents // latent, d, rows, data, runtime.device))
    per_epoch = math.ceil(amount.rows / config.batch_size)
    steps = min(config.max_steps or per_epoch * config.epochs, per_epoch * config.epochs)
    one_copy = (2 * d + 1) * config.n_latents * size
    disk = (keep + 1) * 3 * one_copy + one_copy  # one more than is kept while it is being written
    seconds = 2 * steps * rows * _product_seconds_per_row(config.n_latents // latent, d, runtime.device, size)
    memory_free, disk_free = free_memory(runtime.device), shutil.disk_usage(existing(out)).free
    advice = []
    if sum(memory) > memory_free:
        if memory.held > memory_free // 2:
            needed = 2 ** math.ceil(math.log2(memory.held / (memory_free // 2)))
            advice.append(f"memory does not fit: raise --latent-parallel to {latent * needed} (on as many processes)")
        else:
            parts = math.ceil(memory.step * config.accumulate / (memory_free - memory.held))
            advice.append(f"memory does not fit: raise --accumulate to {parts}, or lower --batch-size")
    if disk > disk_free:
        advice.append(f"disk does not fit: lower --keep {keep}, or choose another --out")
    unreached = config.never_reached(steps)
    notes = (f"flags   {unreached}",) if unreached else ()
    return Plan(steps, memory, memory_free, disk, disk_free, seconds, "; ".join(advice), notes)


def free_memory(device: torch.device) -> int:
    """Bytes that a new process could use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: unknown, so nothing is refused
        return 2**62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@torch.no_grad()
def _product_seconds_per_row(n: int, d: int, device: torch.device, size: int) -> float:
    """Of the encoder's product with at most 8,192 latents, scaled to `n`: the best of three."""
    few = min(n, 8192)
    dtype = torch.float64 if size == 8 else torch.float32
    z, W_enc = torch.ones(PROBE_ROWS, d, dtype=dtype, device=device), torch.ones(few, d, dtype=dtype, device=device)
    times = []
    for _ in range(3):
        began = time.monotonic()
        linear(z, W_enc).sum().item()
        times.append(time.monotonic() - began)
    return min(times) / PROBE_ROWS * n / few


def existing(path: Path) -> Path:
    """The nearest folder on the way to `path` that is there."""
    while not path.exists():
        path = path.parent
    return path


def gib(n: int) -> str:
    """`n` bytes, for people."""
    return f"{n / GIB:,.2f} GiB"

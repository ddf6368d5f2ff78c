"""Read the batches folder: any run of rows in the order of training, and the statistics.

Shapes: N rows, d model width.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from core.artifact import Artifact, open_artifact
from core.runtime import Comm
from sae.hyperparameters import Hyperparameters
from sae.loader import Loader, Segments

CONSTANT = 1e-6  # spread over mean, below which rows in float32 differ by their rounding alone


class Statistics:
    """Exact statistics of the training rows x, and of z under each norm (see sae.shuffle.write_statistics)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.count = int(tensors["count"])
        self.mean_norm = float(tensors["mean_norm"])
        self.d_model = len(tensors["mean"])

    def centre(self, norm: str, which: str = "mean") -> Tensor:
        """`mean` or `geometric_median` of z, float64 [d]. ValueError where the latter was not taken."""
        name = which if norm == "none" else f"{norm}_{which}"
        if name not in self._tensors:
            raise ValueError(
                f"--b-pre {which}: these batches were made without it; make them with sae.preprocess --median-rows 32768"
            )
        return self._tensors[name]

    def total_variance(self, norm: str) -> float:
        """Variance of z, summed over its d entries."""
        return float(self._tensors["variance" if norm == "none" else f"{norm}_variance"].sum())

    def refuse_constant(self, norm: str) -> None:
        """ValueError where all rows are the same under `norm`, up to float32's rounding."""
        variance, centre = self.total_variance(norm), float(self.centre(norm).square().sum())
        if not variance > CONSTANT**2 * centre:
            under = "" if norm == "none" else f" under --norm {norm}"
            raise ValueError(
                f"all {self.count:,} training rows are the same{under}: variance {variance:.3g}, squared mean {centre:.3g}; "
                "nothing can be learned from them. Check the model, the site and the corpus"
            )

    def scale(self, norm: str) -> float:
        """`sqrt(d) / E||x||` for `dataset`, else 1. ValueError where all rows are zero."""
        if norm != "dataset":
            return 1.0
        if not self.mean_norm > 0:
            raise ValueError("all activations are zero; nothing can be learned from them. Check the model and the site")
        return math.sqrt(self.d_model) / self.mean_norm


class Rows:
    """The rows of one split, numbered across its files in order of name."""

    def __init__(self, artifact: Artifact, split: str) -> None:
        self._artifact = artifact
        self._files = sorted(name for name in artifact.names if name.startswith(f"{split}-"))
        starts = torch.tensor([0] + [artifact.rows(name) for name in self._files]).cumsum(0)
        self._starts: list[int] = starts.tolist()
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, [stop - start, d], in the dtype they are stored in."""
        parts = []
        for name, first, end in zip(self._files, self._starts, self._starts[1:], strict=False):
            a, b = max(start, first), min(stop, end)
            if a < b:
                parts.append(self._slice(name)[a - first : b - first])
        return torch.cat(parts)

    def _slice(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._artifact.file(name), framework="pt").get_slice("x")  # type: ignore[no-untyped-call]
        return self._open[name]


class Batches:
    """A batches folder: rows of both splits, statistics, and provenance. ValueError where the folder is not a complete one."""

    def __init__(self, path: Path) -> None:
        self.artifact = open_artifact(path, "batches")
        self.train, self.validation = Rows(self.artifact, "train"), Rows(self.artifact, "validation")
        self.statistics = Statistics(safetensors.torch.load_file(self.artifact.file("statistics.safetensors")))
        self.provenance = self.artifact.manifest.provenance
        self.batch_rows = int(self.artifact.manifest.config["batch_rows"])

    @property
    def trained_on(self) -> dict[str, Any]:
        """What an SAE's provenance says of these rows besides their own."""
        return {"batches_hash": self.artifact.manifest.hash, "training_rows": self.statistics.count}

    def reader(self, config: Hyperparameters, data: Comm, device: torch.device) -> "BatchReader":
        """The training rows in the order of `config`, of which the ranks of `data` take a share each."""
        schedule = Schedule(len(self.train), self.batch_rows, config.batch_size, config.rows_seed)
        all_steps = schedule.steps_per_epoch * config.epochs
        total_steps = min(config.max_steps or all_steps, all_steps)
        return BatchReader(partial(self._read, self.train), schedule, total_steps, data, device)

    def _read(self, rows: Rows, segments: Segments) -> Tensor:
        """Rows [N, d], on the CPU; N may be 0."""
        parts = [rows.read(start, stop) for start, stop in segments]
        return torch.cat(parts) if parts else torch.empty(0, self.statistics.d_model)


class Schedule:
    """Which rows make up which step: `batch_size` rows a step, epoch after epoch, whatever the number of ranks.

    The first epoch takes the rows as they lie, which is a random order already; later ones take their batches in a fresh order.
    The last step of an epoch holds the rows that are left.
    """

    def __init__(self, n_rows: int, batch_rows: int, batch_size: int, seed: int) -> None:
        self.n_rows, self.batch_rows, self.batch_size, self.seed = n_rows, batch_rows, batch_size, seed
        self.steps_per_epoch = -(-n_rows // batch_size)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def rows_in(self, step: int) -> int:
        """How many rows all ranks together take in step `step` (from 0)."""
        start = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.n_rows - start)

    def segments(self, step: int, rank: int, world_size: int) -> Iterator[tuple[int, int]]:
        """The stretches (start, stop) of rows that rank `rank` reads for step `step`; together the ranks read each row once."""
        epoch, within = divmod(step, self.steps_per_epoch)
        n = self.rows_in(step)
        first = within * self.batch_size
        start, stop = first + n * rank // world_size, first + n * (rank + 1) // world_size
        order = self._batch_order(epoch)
        while start < stop:
            batch, offset = divmod(start, self.batch_rows)
            take = min(stop - start, self.batch_rows - offset)
            at = int(order[batch]) * self.batch_rows + offset
            yield at, at + take
            start += take

    def _batch_order(self, epoch: int) -> Tensor:
        """The whole batches in this epoch's order, then the partial one where there is one."""
        if epoch != self._epoch:
            whole, rest = divmod(self.n_rows, self.batch_rows)
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            order = torch.randperm(whole, generator=generator) if epoch else torch.arange(whole)
            self._epoch, self._order = epoch, torch.cat((order, torch.arange(whole, whole + bool(rest))))
        return self._order


class BatchReader:
    """The rows of each step, on `device`; any step may be asked for."""

    def __init__(
        self,
        read: Callable[[Segments], Tensor],
        schedule: Schedule,
        total_steps: int,
        data: Comm,
        device: torch.device,
    ) -> None:
        self.total_steps, self._schedule, self._data = total_steps, schedule, data
        self._loader = Loader(read, device)

    def rows_in(self, step: int) -> int:
        """How many rows all ranks together take in step `step` (from 0)."""
        return self._schedule.rows_in(step)

    def take(self, step: int) -> Tensor:
        """This rank's rows of `step` [n, d]; on a GPU those of the next one are begun."""
        return self._loader.take(*(self._segments(step) for step in (step, step + 1)))

    def position(self, step: int) -> dict[str, Tensor]:
        """Nothing: the step says it all."""
        return {}

    def seek(self, step: int, position: Mapping[str, Tensor]) -> None:
        """Nothing to do: see `position`."""

    def _segments(self, step: int) -> Segments:
        """What this rank reads in `step`: nothing behind the last one."""
        data = self._data
        return list(self._schedule.segments(step, data.rank, data.size)) if step < self.total_steps else []

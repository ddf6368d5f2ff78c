"""What `statistics.safetensors` says of training rows, gathered part by part.

Shapes: N rows, d width.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from core.norms import LARGEST, SMALLEST
from sae.batches import Statistics
from sae.config import SAEConfig
from sae.model import layer_normalised
from sae.running_statistics import BLOCK_ROWS, RunningStatistics


def refuse_large(norms: Tensor) -> None:
    """ValueError where float32 cannot sum up the squares of a row with one of these `norms` [N]."""
    if len(norms) and (largest := float(norms.max())) > LARGEST:
        raise ValueError(
            f"activations hold a finite row of norm {largest:.3g}, whose squares float32 cannot sum up; expected norms up to "
            f"{LARGEST:g}. Drop such rows with --max-norm-ratio 10, or check the model and the site"
        )


@dataclass
class RowStatistics:
    """Mean and spread of rows x and of z under `layer`, and the sum of their norms; float64."""

    raw: RunningStatistics
    layer: RunningStatistics
    norm_sum: float

    @classmethod
    def of(cls, rows: Tensor, norms: Tensor) -> Self:
        """Of `rows` [N, d] with their `norms` [N]; computed where they lie, the result on the CPU."""
        parts = [RunningStatistics.none(rows.shape[1], rows.device) for _ in range(2)]
        for block in torch.split(rows, BLOCK_ROWS):
            parts[0].merge(RunningStatistics.of(block))
            parts[1].merge(RunningStatistics.of(layer_normalised(block.float(), SAEConfig.norm_eps).z))
        raw, layer = (RunningStatistics(part.count, part.mean.cpu(), part.m2.cpu()) for part in parts)
        return cls(raw, layer, float(norms.sum()))

    @classmethod
    def read(cls, count: int, record: dict[str, Tensor]) -> Self:
        """What `record` wrote, of `count` rows."""
        return cls(
            RunningStatistics(count, record["mean"], record["m2"]),
            RunningStatistics(count, record["layer_mean"], record["layer_m2"]),
            float(record["norm_sum"]),
        )

    def record(self) -> dict[str, Tensor]:
        """Everything but the count."""
        return {
            "norm_sum": torch.tensor(self.norm_sum, dtype=torch.float64),
            "mean": self.raw.mean,
            "m2": self.raw.m2,
            "layer_mean": self.layer.mean,
            "layer_m2": self.layer.m2,
        }

    def merge(self, other: "RowStatistics") -> None:
        """Become the statistics of both sets of rows; the last digits depend on the order of merging."""
        self.raw.merge(other.raw)
        self.layer.merge(other.layer)
        self.norm_sum += other.norm_sum

    @property
    def scale(self) -> float:
        """`sqrt(d) / E||x||`; 1 where all rows are zero."""
        return math.sqrt(len(self.raw.mean)) / self.mean_norm if self.mean_norm else 1.0

    @property
    def mean_norm(self) -> float:
        return self.norm_sum / self.raw.count

    def tensors(self) -> dict[str, Tensor]:
        """`count`, `mean_norm` (E||x||); float64 [d] `mean` and `variance` of x, `dataset_mean` and `dataset_variance` of
        z = x sqrt(d) / E||x||, `layer_mean` and `layer_variance` of z under `layer`.

        ValueError where they are too small for float32, or all rows are the same.
        """
        raw, layer, mean_norm, scale = self.raw, self.layer, self.mean_norm, self.scale
        if 0 < mean_norm < SMALLEST:
            raise ValueError(
                f"the mean norm of the activations is {mean_norm:.3g}, whose squares float32 cannot hold; expected at least "
                f"{SMALLEST:g}. Check the model and the site"
            )
        tensors = {
            "count": torch.tensor(raw.count),
            "mean_norm": torch.tensor(mean_norm, dtype=torch.float64),
            "mean": raw.mean,
            "variance": raw.variance,
            "dataset_mean": raw.mean * scale,
            "dataset_variance": raw.variance * scale**2,
            "layer_mean": layer.mean,
            "layer_variance": layer.variance,
        }
        Statistics(tensors).refuse_constant("none")
        return tensors

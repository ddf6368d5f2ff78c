"""Centres and spread of rows in float64: streaming mean and variance (Welford 1962; merging after Chan, Golub and LeVeque
1979), and the geometric median (Weiszfeld 1937)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 256  # float64 copies of so many rows stay in the cache
SMALLEST_DISTANCE = 1e-150  # far below that of any two different rows in float32, and its inverse can be summed up
MEDIAN_TOLERANCE, MEDIAN_ROUNDS = 1e-6, 100  # relative to the first mean distance; each round goes over all rows


@dataclass
class RunningStatistics:
    """Count, mean [d] and sum of squared deviations `m2` [d] of the rows seen so far, float64."""

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "RunningStatistics":
        """Of `rows` [N, d], block by block."""
        statistics = cls.none(rows.shape[1], rows.device)
        for block in torch.split(rows, BLOCK_ROWS):
            block = block.double()
            mean = block.mean(0)
            statistics.merge(cls(len(block), mean, (block - mean).square_().sum(0)))
        return statistics

    @classmethod
    def none(cls, d: int, device: torch.device | None = None) -> "RunningStatistics":
        """Of no rows."""
        return cls(0, *(torch.zeros(d, dtype=torch.float64, device=device) for _ in range(2)))

    def merge(self, other: "RunningStatistics") -> None:
        """Become the statistics of both sets of rows. The result depends on the order of merging in its last digits."""
        count = self.count + other.count
        if count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        self.count = count

    @property
    def variance(self) -> Tensor:
        """Of the rows themselves, [d]: the sum of squares is divided by their number. Zero for no rows."""
        return self.m2 / max(1, self.count)


def geometric_median(rows: Tensor) -> Tensor:
    """The point whose distances to `rows` [N, d] have the smallest sum, float64 [d]; N at least 1.

    Weiszfeld's iteration from the mean: each row is weighed with one over its distance. It stops once a round moves the point
    by less than a millionth of the rows' mean distance.
    """
    point, moved, within = RunningStatistics.of(rows).mean, math.inf, 0.0
    for _ in range(MEDIAN_ROUNDS):
        if moved <= within:
            break
        pulled, weight, distance = torch.zeros_like(point), torch.zeros((), dtype=torch.float64), 0.0
        for block in torch.split(rows, BLOCK_ROWS):
            block = block.double()
            distances = torch.linalg.vector_norm(block - point, dim=1)
            weights = 1 / distances.clamp_min(SMALLEST_DISTANCE)
            pulled += weights @ block
            weight += weights.sum()
            distance += float(distances.sum())
        within = MEDIAN_TOLERANCE * distance / len(rows)
        moved = float((pulled / weight - point).norm())
        point = pulled / weight
    return point

"""Streaming mean and variance in float64 (Welford 1962; merging after Chan, Golub and LeVeque 1979)."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 256  # float64 copies of so many rows stay in the cache


@dataclass
class Moments:
    """Count, mean [d] and sum of squared deviations `m2` [d] of the rows seen so far, float64."""

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Of `rows` [N, d], block by block."""
        moments = cls.none(rows.shape[1])
        for block in torch.split(rows, BLOCK_ROWS):
            block = block.double()
            mean = block.mean(0)
            moments.merge(cls(len(block), mean, (block - mean).square_().sum(0)))
        return moments

    @classmethod
    def none(cls, d: int) -> "Moments":
        """Of no rows."""
        return cls(0, torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))

    def merge(self, other: "Moments") -> None:
        """Become the moments of both sets of rows. The result depends on the order of merging in its last digits."""
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

"""Exact sums behind an evaluation, added up token by token and merged across lanes of work; no mean of means anywhere.

Shapes: N tokens, d model width, n latents, K entries per token.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae.model import Latents
from sae.running_statistics import RunningStatistics

COVARIANCE_ROWS = 4096  # at a time; each block costs one sum over [d, d]

SPLICES = ("sae", "zero", "mean")
"""What may stand in for x in the model: the reconstruction, zero, the mean."""


@dataclass
class Covariance:
    """Count, mean [d] and sum of outer products of deviations `m2` [d, d], float64 (Chan, Golub and LeVeque 1979)."""

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def none(cls, d: int) -> "Covariance":
        return cls(0, torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Take in `rows` [N, d]."""
        for block in torch.split(rows.cpu(), COVARIANCE_ROWS):
            block = block.double()
            mean = block.mean(0)
            self.merge(Covariance(len(block), mean, (block - mean).T @ (block - mean)))

    def merge(self, other: "Covariance") -> None:
        count = self.count + other.count
        if count == 0 or other.count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.m2 = self.m2 + other.m2 + torch.outer(delta, delta) * (self.count * other.count / count)
        self.count = count

    def components(self, k: int) -> Tensor:
        """The k directions of largest variance, orthonormal columns [d, min(k, d)]."""
        eigenvectors: Tensor = torch.linalg.eigh(self.m2).eigenvectors  # by rising eigenvalue
        return eigenvectors.flip(1)[:, :k]


@dataclass
class Accumulator:
    """Sums over the tokens seen so far."""

    statistics: RunningStatistics
    """Of x."""
    firing_counts: Tensor
    """Tokens at which each latent fired: int64 [n]."""
    l0_histogram: Tensor
    """Tokens with 0, 1, ..., K active latents: int64 [K + 1]."""
    excluded: int = 0
    """Tokens left as they are and out of all sums over x, for their abnormal norm."""
    targets: int = 0
    """Tokens predicted, for cross-entropy and KL."""
    sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def none(cls, d: int, n_latents: int, k: int) -> "Accumulator":
        return cls(RunningStatistics.none(d), torch.zeros(n_latents, dtype=torch.long), torch.zeros(k + 1, dtype=torch.long))

    def add(self, name: str, values: Tensor) -> None:
        """Add up `values`, in float64, under `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())

    def add_reconstruction(self, x: Tensor, x_hat: Tensor, latents: Latents) -> None:
        """Take in tokens `x` [N, d], their reconstructions and their latents."""
        x, x_hat = x.double(), x_hat.double()
        dot, norm, norm_hat = (x * x_hat).sum(1), x.norm(dim=1), x_hat.norm(dim=1)
        tiny = torch.finfo(torch.float64).tiny
        self.statistics.merge(RunningStatistics.of(x.cpu()))
        self.add("residual", (x - x_hat).square())
        self.add("dot", dot)
        self.add("norm_hat_squared", norm_hat.square())
        self.add("cosine", dot / (norm * norm_hat).clamp(min=tiny))
        self.add("l2_ratio", norm_hat / norm.clamp(min=tiny))
        active = latents.values > 0
        self.firing_counts += torch.bincount(latents.indices[active], minlength=len(self.firing_counts)).cpu()
        self.l0_histogram += torch.bincount(active.sum(1), minlength=len(self.l0_histogram)).cpu()

    def merge(self, other: "Accumulator") -> None:
        self.statistics.merge(other.statistics)
        self.firing_counts += other.firing_counts
        self.l0_histogram += other.l0_histogram
        self.excluded += other.excluded
        self.targets += other.targets
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @property
    def tokens(self) -> int:
        return self.statistics.count

    def fvu(self, residual: str = "residual") -> float:
        """Fraction of variance unexplained: `sum ||x - x_hat||^2 / sum ||x - mean(x)||^2`, the mean over all tokens."""
        return _ratio(self.sums.get(residual, math.nan), float(self.statistics.m2.sum()))

    def mean(self, name: str, per: int) -> float:
        return _ratio(self.sums.get(name, math.nan), per)

    def l0_quantile(self, share: float) -> int:
        """The smallest L0 that at least `share` of the tokens do not exceed."""
        below = self.l0_histogram.cumsum(0)
        return int(torch.searchsorted(below, math.ceil(share * int(below[-1]))))

    def recovered(self, ablation: str) -> float:
        """`(CE_ablated - CE_sae) / (CE_ablated - CE_clean)`: 1 is perfect, 0 as bad as the ablation."""
        clean, sae, ablated = (self.sums.get(f"ce_{name}", math.nan) for name in ("clean", "sae", ablation))
        return _ratio(ablated - sae, ablated - clean)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan

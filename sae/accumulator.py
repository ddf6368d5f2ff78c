"""Exact sums behind an evaluation, by group of documents, merged across lanes of work; no mean of means anywhere.

Groups are there for the bootstrap (sae.evaluating.bootstrap): a resample weighs the groups and leaves the rest as it is.
Shapes: N tokens, P predicted tokens, G groups, d model width, n latents, K entries per token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae.model import Latents

COVARIANCE_ROWS = 4096  # at a time; each block costs one sum over [d, d]


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
    """Sums over the tokens seen so far: float64 or counts, the first dimension of each is G."""

    n_groups: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    excluded: int = 0
    """Tokens left as they are and out of all sums over x, for their abnormal norm."""

    @classmethod
    def none(cls, d: int, n_latents: int, k: int, n_groups: int = 1) -> "Accumulator":
        """For an SAE; `n_latents` 0: for what has no latents."""
        sums = {"tokens": torch.zeros(n_groups, dtype=torch.long), "x": torch.zeros(n_groups, d, dtype=torch.float64)}
        if n_latents:
            sums["fired"] = torch.zeros(n_groups, n_latents, dtype=torch.int32)
            sums["fired_sentences"] = torch.zeros(n_groups, n_latents, dtype=torch.int32)
            sums["l0"] = torch.zeros(n_groups, k + 1, dtype=torch.int32)
        return cls(n_groups, sums)

    def add(self, name: str, values: Tensor, groups: Tensor) -> None:
        """Add up `values` [N, ...], in float64, under `name`; `groups` [N] int64."""
        values = values.double().cpu()
        into = self.sums.setdefault(name, torch.zeros(self.n_groups, *values.shape[1:], dtype=torch.float64))
        into.index_add_(0, groups.cpu(), values)

    def add_reconstruction(
        self,
        x: Tensor,
        x_hat: Tensor,
        latents: Latents | None = None,
        groups: Tensor | None = None,
        sentences: Tensor | None = None,
    ) -> None:
        """Take in tokens `x` [N, d], their reconstructions, and the latents, group and sentence of each (None: all in one)."""
        groups = torch.zeros(len(x), dtype=torch.long) if groups is None else groups.cpu()
        x, x_hat = x.double(), x_hat.double()
        residual, dot, norm, norm_hat = (x - x_hat).square().sum(1), (x * x_hat).sum(1), x.norm(dim=1), x_hat.norm(dim=1)
        spread = (x - x.mean(0)).square().sum(1) if len(x) else norm
        self.sums["tokens"] += torch.bincount(groups, minlength=self.n_groups)
        tiny = torch.finfo(torch.float64).tiny
        for name, values in {
            "x": x,
            "x_squared": norm.square(),
            "norm": norm,
            "norm_hat": norm_hat,
            "residual": residual,
            "dot": dot,
            "norm_hat_squared": norm_hat.square(),
            "cosine": dot / (norm * norm_hat).clamp(min=tiny),
            "l2_ratio": norm_hat / norm.clamp(min=tiny),
            "explained_legacy": torch.where(spread > 0, 1 - residual / spread, 0),
            "tokens_legacy": spread > 0,
        }.items():
            self.add(name, values, groups)
        if latents is not None:
            self._add_latents(latents, groups, groups if sentences is None else sentences.cpu())

    def _add_latents(self, latents: Latents, groups: Tensor, sentences: Tensor) -> None:
        values, indices = latents.values.cpu(), latents.indices.cpu()
        active = values > 0
        self.add("l1", values.sum(1), groups)
        group = groups[:, None].expand_as(indices)[active]
        n_latents = self.sums["fired"].shape[1]
        _count(self.sums["fired"], group * n_latents + indices[active])
        _count(self.sums["l0"], groups * self.sums["l0"].shape[1] + active.sum(1))
        # each latent once a sentence
        pairs = torch.unique(sentences[:, None].expand_as(indices)[active] * n_latents + indices[active])
        group_of = torch.zeros(int(sentences.max()) + 1 if len(sentences) else 1, dtype=torch.long)
        group_of[sentences] = groups
        _count(self.sums["fired_sentences"], group_of[pairs // n_latents] * n_latents + pairs % n_latents)

    def merge(self, other: "Accumulator") -> None:
        self.excluded += other.excluded
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def total(self, name: str) -> Tensor:
        """Over all groups."""
        return self.sums[name].sum(0)

    @property
    def tokens(self) -> int:
        return int(self.total("tokens"))

    @property
    def firing_counts(self) -> Tensor:
        """Tokens at which each latent fired, int64 [n]."""
        return self.total("fired")

    @property
    def l0_histogram(self) -> Tensor:
        """Tokens with 0, 1, ..., K active latents: int64 [K + 1]."""
        return self.total("l0")


def _count(counts: Tensor, places: Tensor) -> None:
    """Add 1 to `counts` at each of the flat `places`."""
    flat = counts.view(-1)
    flat.index_add_(0, places, torch.ones_like(places, dtype=counts.dtype))

"""k-sparse probes: how well a few coordinates tell whether a text has a label (Gurnee et al. 2023, arXiv:2305.01610).

Shapes: N texts, m coordinates, k chosen ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from sae.evaluating.bootstrap import interval

Score = Callable[[Tensor, Tensor], float]
"""Of decision values [N], above 0 where the label is predicted, and labels [N]."""


class Split(NamedTuple):
    """Texts to fit on and texts of other documents to score on: coordinates [N, m] and labels, bool [N]."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    test_documents: Tensor
    """Of each test text, int64."""

    def columns(self, chosen: Tensor) -> "Split":
        return self._replace(x=self.x[:, chosen], test_x=self.test_x[:, chosen])


class Rate(NamedTuple):
    """A number with its 95 % interval over documents."""

    value: float
    interval: tuple[float, float] | None


class Probed(NamedTuple):
    """How a probe does on the test texts, and the coordinates that it reads."""

    accuracy: Rate
    auc: Rate
    chosen: list[int]

    def record(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy._asdict(), "auc": self.auc._asdict(), "chosen": self.chosen}


def separation(x: Tensor, y: Tensor) -> Tensor:
    """Difference of the two means of each coordinate over its spread, [m]; 0 where it does not vary."""
    spread = x.std(0)
    difference = x[y].mean(0) - x[~y].mean(0)
    return torch.where(spread > 0, difference / spread, 0)


def strongest(x: Tensor, y: Tensor, k: int) -> Tensor:
    """The k coordinates that tell the label best, one at a time, [min(k, m)]."""
    return separation(x, y).abs().topk(min(k, x.shape[1])).indices


def logistic(split: Split, k: int, resamples: int, seed: int) -> Probed:
    """A logistic regression on the `k` strongest coordinates, each scaled to unit spread."""
    chosen = strongest(split.x, split.y, k)
    part = split.columns(chosen)
    mean, spread = part.x.mean(0), part.x.std(0).clamp(min=1e-12)
    model = LogisticRegression(max_iter=1000).fit(((part.x - mean) / spread).numpy(), part.y.numpy())
    decision = torch.from_numpy(model.decision_function(((part.test_x - mean) / spread).numpy()))
    return scored(decision, split, chosen.tolist(), resamples, seed)


def difference_of_means(split: Split, resamples: int, seed: int) -> Probed:
    """Along the line between the two means, cut half way."""
    high, low = split.x[split.y].mean(0), split.x[~split.y].mean(0)
    decision = (split.test_x - (high + low) / 2) @ (high - low)
    return scored(decision, split, [], resamples, seed)


def scored(decision: Tensor, split: Split, chosen: list[int], resamples: int, seed: int) -> Probed:
    """Accuracy and AUC of decision values [N] on the test texts, with intervals by the bootstrap over documents."""
    places = torch.unique(split.test_documents, return_inverse=True)[1]
    members = [(places == document).nonzero()[:, 0] for document in range(int(places.max()) + 1)]
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(len(members), (len(members),), generator=generator) for _ in range(resamples)]
    drawn = [torch.cat([members[document] for document in draw.tolist()]) for draw in draws]
    rates = []
    for score in (_accuracy, _auc):
        value = score(decision, split.test_y)
        resampled = [score(decision[rows], split.test_y[rows]) for rows in drawn if 0 < split.test_y[rows].sum() < len(rows)]
        rates.append(Rate(value, interval(value, torch.tensor(resampled)) if resampled else None))
    return Probed(rates[0], rates[1], chosen)


def _accuracy(decision: Tensor, y: Tensor) -> float:
    return float(((decision > 0) == y).double().mean())


def _auc(decision: Tensor, y: Tensor) -> float:
    return float(roc_auc_score(y.numpy(), decision.numpy()))

"""What is attributed: one number of the next-token distribution, and how its gradients become effects of features.

Shapes: R rows of a batch that differ in nothing but the number whose gradient is asked for, B rows,
V vocabulary, H features at positions.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """The effect of a feature is what the objective loses when the feature is taken out."""

    @property
    def n_rows(self) -> int:
        """R: gradients that are needed, all of one batched pass."""

    def scores(self, logits: Tensor) -> Tensor:
        """(R,) numbers whose gradients are needed, one of each row of `logits` (R, V)."""

    def effects(self, first_order: Tensor, logits: Tensor) -> Tensor:
        """(H,) predicted effects, from the first-order changes of `scores` (R, H) and the logits (R, V) of the rows."""

    def measured(self, clean: Tensor, changed: Tensor) -> Tensor:
        """(B,) effects of changes that turned the logits `clean` (V,) into `changed` (B, V)."""


@dataclass(frozen=True)
class LogitDifference:
    """The logit of `answer` minus that of `baseline`, or minus the mean of all logits where that is None."""

    answer: int
    baseline: int | None = None

    n_rows = 1

    def scores(self, logits: Tensor) -> Tensor:
        against = logits.mean(-1) if self.baseline is None else logits[:, self.baseline]
        return logits[:, self.answer] - against

    def effects(self, first_order: Tensor, logits: Tensor) -> Tensor:
        return first_order[0]

    def measured(self, clean: Tensor, changed: Tensor) -> Tensor:
        return self.scores(clean[None]) - self.scores(changed)


@dataclass(frozen=True)
class Divergence:
    """KL(before || after) of the whole next-token distribution, in nats: how much a feature matters, whichever way.

    Its gradient at the unchanged prompt is zero. The first term that is not is of second order: with
    g_y the gradient of log p(y), taking out c adds `1/2 sum_y p(y) (g_y . c)^2` (the Fisher
    information; Amari 2016, Information Geometry and Its Applications, 1.2). The sum goes over the
    `outcomes` likeliest tokens and all others as one, whose KL is a lower bound of the whole.
    """

    outcomes: int = 15

    @property
    def n_rows(self) -> int:
        return self.outcomes + 1

    def scores(self, logits: Tensor) -> Tensor:
        likeliest = logits[0].detach().topk(self.outcomes).indices
        logs = logits.log_softmax(-1)
        others = torch.ones_like(logits[0], dtype=torch.bool).index_fill(0, likeliest, False)
        named = logs[torch.arange(self.outcomes), likeliest]
        return torch.cat((named, logs[-1][others].logsumexp(0)[None]))

    def effects(self, first_order: Tensor, logits: Tensor) -> Tensor:
        chances = self.scores(logits).exp()
        return (chances[:, None] * first_order.square()).sum(0) / 2

    def measured(self, clean: Tensor, changed: Tensor) -> Tensor:
        before, after = clean.log_softmax(-1), changed.log_softmax(-1)
        return (before.exp() * (before - after)).sum(-1)

"""A latent as an alarm: the threshold for a chosen rate of false alarms, and what it does on other documents.

Shapes: N texts, n latents.
"""

from typing import Any, NamedTuple

from scipy.stats import beta
from sklearn.metrics import roc_auc_score
from torch import Tensor

from sae.probing.probes import Split, strongest

CANDIDATES = 20


class Share(NamedTuple):
    """`n` of `of` texts, with the exact 95 % interval for independent texts (Clopper and Pearson 1934)."""

    n: int
    of: int

    def record(self) -> dict[str, Any]:
        low = float(beta.ppf(0.025, self.n, self.of - self.n + 1)) if self.n else 0.0
        high = float(beta.ppf(0.975, self.n + 1, self.of - self.n)) if self.n < self.of else 1.0
        return {"value": self.n / self.of, "interval": [low, high], "n": self.n, "of": self.of}


class LatentAlarm(NamedTuple):
    """Rings where the latent's largest activation in a text exceeds `threshold`."""

    latent: int
    threshold: float
    false_alarms: Share
    detected: Share

    def record(self) -> dict[str, Any]:
        rates = {"false_alarm_rate": self.false_alarms.record(), "detection_rate": self.detected.record()}
        return {"latent": self.latent, "threshold": self.threshold} | rates


def threshold_for(negatives: Tensor, rate: float) -> float:
    """The smallest of the values [N] of texts without the label that at most the share `rate` of them exceed."""
    ordered = negatives.sort(descending=True).values
    return float(ordered[min(int(rate * len(ordered)), len(ordered) - 1)])


def latent_alarm(peaks: Split, rate: float) -> LatentAlarm | None:
    """The best alarm among the latents that rise with the label: chosen, and its threshold set, on the texts to fit on alone.

    `peaks` hold the largest activation of each latent, [N, n]. None where no latent rises with the label.
    """
    candidates = [latent for latent in strongest(peaks.x, peaks.y, CANDIDATES).tolist() if _rises(peaks, latent)]
    if not candidates:
        return None
    best = max(candidates, key=lambda latent: roc_auc_score(peaks.y.numpy(), peaks.x[:, latent].numpy()))
    threshold = threshold_for(peaks.x[~peaks.y, best], rate)
    rings = peaks.test_x[:, best] > threshold
    negatives, positives = rings[~peaks.test_y], rings[peaks.test_y]
    return LatentAlarm(
        best, threshold, Share(int(negatives.sum()), len(negatives)), Share(int(positives.sum()), len(positives))
    )


def _rises(peaks: Split, latent: int) -> bool:
    values = peaks.x[:, latent]
    return bool(values[peaks.y].mean() > values[~peaks.y].mean())

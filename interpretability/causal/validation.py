"""Do figures that are measured before generating tell which features steer? Against what inference.steering_eval measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from interpretability.causal.agreement import spearman_interval
from interpretability.causal.records import MEASURES, STEERING_MEASURES, Steerability, SteeredFeature

FEWEST = 10
"""Features below which nothing is said."""


def validate(steerability: Steerability, steered: Sequence[SteeredFeature], resamples: int, seed: int) -> list[dict[str, Any]]:
    """For each of MEASURES and each effect of steering: how well the one ranks the other.

    `spearman` comes with its 95 % bootstrap interval over features. `top_decile` is the median effect of the tenth
    of features with the largest figure, `median` that of all; `success` the share of that tenth that lies above
    the median of all. ValueError for fewer than FEWEST features.
    """
    if len(steered) < FEWEST:
        raise ValueError(f"{len(steered)} features with a best strength were found, expected {FEWEST} at least; steer more")
    latents = [feature.latent for feature in steered]
    rows = []
    for measure in MEASURES:
        figures = getattr(steerability, measure)[latents].astype(np.float64)
        top = np.argsort(-figures, kind="stable")[: max(1, len(figures) // 10)]
        for effect in STEERING_MEASURES:
            effects = np.array([feature.effects[effect] for feature in steered])
            rho = spearman_interval(figures, effects, resamples, seed)
            middle = float(np.median(effects))
            rows.append(
                {
                    "measure": measure,
                    "effect": effect,
                    "features": len(steered),
                    "spearman": rho._asdict() if rho else None,
                    "top_decile": float(np.median(effects[top])),
                    "median": middle,
                    "success": float(np.mean(effects[top] > middle)),
                }
            )
    return rows

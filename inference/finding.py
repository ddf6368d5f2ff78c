"""Finding features: by words of their explanations, by what fires on texts, by the direction that they write in."""

from collections.abc import Sequence
from typing import NamedTuple

from inference.session import Feature, Features, Session
from interpretability.records import trust
from interpretability.search import neighbours, search_prompts, search_text

MAX_RESULTS = 40
N_NEIGHBOURS = 8


class Hit(NamedTuple):
    """A feature that a search found."""

    feature: Feature
    label: str
    value: float
    """For `by_words` how far its label can be trusted, 0 to 1; for `by_prompts` the mean share of its maximum, less that on
    the prompts against it; for `similar` the cosine."""
    token: str = ""
    """Where it fires most, for `by_prompts`."""

    @property
    def latent(self) -> int:
        return self.feature.latent


def hit(features: Features, latent: int, value: float, token: str = "") -> Hit:
    """One latent of `features` as found."""
    return Hit(Feature(features.site, latent), features.label(latent), value, token)


def confidence(features: Features, latent: int) -> float:
    """How far the label of a latent can be trusted (`trust`); 0 without one."""
    explanation = features.explanations.get(latent)
    return trust(explanation) if explanation is not None else 0.0


def by_words(features: Features, query: str, n: int = MAX_RESULTS) -> list[Hit]:
    """Features whose label or explanation holds words that begin with those of `query`, best first.

    An empty query gives the features that are shown first.
    """
    if not query.strip():
        return [hit(features, latent, confidence(features, latent)) for latent in features.first[:n]]
    return [hit(features, match.latent, match.score) for match in search_text(features.explanations, query, n)]


def by_prompts(
    session: Session, features: Features, positive: Sequence[str], negative: Sequence[str] = (), n: int = MAX_RESULTS
) -> list[Hit]:
    """Features that fire on the prompts of `positive` and not on those of `negative`, by the mean over the prompts of their
    largest value in units of their maximum."""
    sae, maxima = features.sae, features.max_values
    found = search_prompts(sae, session.model, session.tokenizer, features.site, maxima, positive, negative)
    return [hit(features, ranked.latent, ranked.score, ranked.token) for ranked in found[:n]]


def similar(features: Features, latent: int, n: int = N_NEIGHBOURS) -> list[Hit]:
    """The features that write in the most similar direction: cosine of decoder rows."""
    return [hit(features, near.latent, near.cosine) for near in neighbours(features.sae.W_dec, latent, n)]

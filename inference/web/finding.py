"""Finding features for the app: by their labels, by what fires on a text, by the direction that they write in."""

from typing import Any, NamedTuple

from inference.session import Feature, Features, Session
from inference.web.validation import MAX_QUERY_CHARACTERS, checked_latent, split_prompts
from inference.web.workbench import confidence
from interpretability.search import neighbours, search_prompts, search_text

MAX_RESULTS = 40
N_NEIGHBOURS = 8


class Hit(NamedTuple):
    """A feature that a search found."""

    feature: Feature
    label: str
    value: float
    """0 to 1: how far its label can be trusted for `by_label`, share of its maximum for `by_text`, cosine for `similar`."""
    token: str = ""
    """Where it fires most, for `by_text`."""


def hit(features: Features, latent: int, value: float, token: str = "") -> Hit:
    """One latent of `features` as found."""
    return Hit(Feature(features.site, latent), features.label(latent), value, token)


def by_label(features: Features, query: Any, n: int = MAX_RESULTS) -> list[Hit]:
    """Features whose label or explanation holds words that begin with those of `query`, best first; a number finds that latent.

    An empty query gives the best explained features.
    """
    if not isinstance(query, str) or len(query) > MAX_QUERY_CHARACTERS:
        raise ValueError(f"a search takes up to {MAX_QUERY_CHARACTERS} characters of text")
    text = query.strip()
    if text.lstrip("#").isdecimal():
        latent = checked_latent(features, text)
        return [hit(features, latent, confidence(features, latent))]
    return [hit(features, match.latent, match.score) for match in search_text(features.explanations, query, n)]


def by_text(session: Session, features: Features, text: Any, n: int = MAX_RESULTS) -> list[Hit]:
    """Features that fire on `text`, by the mean over its lines of their largest value in units of their maximum."""
    prompts = split_prompts(text)
    found = search_prompts(features.sae, session.model, session.tokenizer, features.site, features.max_values, prompts)
    return [hit(features, ranked.latent, ranked.score, ranked.token) for ranked in found[:n]]


def similar(features: Features, latent: int, n: int = N_NEIGHBOURS) -> list[Hit]:
    """The features that write in the most similar direction: cosine of decoder rows."""
    return [hit(features, near.latent, near.cosine) for near in neighbours(features.sae.W_dec, latent, n)]

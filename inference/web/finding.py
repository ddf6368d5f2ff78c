"""What the app's search field asks for: features by their labels, by their number, or by what fires on a text."""

from typing import Any

from inference.finding import Hit, by_prompts, by_words, confidence, hit
from inference.session import Features, Session
from inference.web.validation import MAX_QUERY_CHARACTERS, checked_latent, split_prompts


def by_label(features: Features, query: Any) -> list[Hit]:
    """As `by_words`; a number finds that latent. ValueError for a query that is too long or no text."""
    if not isinstance(query, str) or len(query) > MAX_QUERY_CHARACTERS:
        raise ValueError(f"a search takes up to {MAX_QUERY_CHARACTERS} characters of text")
    text = query.strip()
    if text.lstrip("#").isdecimal():
        latent = checked_latent(features, text)
        return [hit(features, latent, confidence(features, latent))]
    return by_words(features, query)


def by_text(session: Session, features: Features, text: Any) -> list[Hit]:
    """Features that fire on the lines of `text`, as `by_prompts`. ValueError for a text beyond the app's limits."""
    return by_prompts(session, features, split_prompts(text))

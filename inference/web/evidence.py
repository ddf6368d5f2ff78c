"""HTML of what is known about a feature, without anything to click: for the app's page and for notebooks.

Whatever comes from a model or a corpus is escaped here.
"""

import math
from collections.abc import Sequence
from html import escape

from inference.card import Card
from interpretability.records import HISTOGRAM_FIRST_EXPONENT, NOT_SHOWN, TopSentence

N_OPEN = 4
"""Sentences that are in sight at once; a click shows the others."""


def shaded(text: str, part: float, title: str) -> str:
    """A piece of text whose background is as strong as `part`, 0 to 1; `title` is its tooltip."""
    return f'<span class="tok" style="--v:{part:.3f}" title="{escape(title)}">{escape(text)}</span>'


def tokens(pieces: Sequence[str], values: Sequence[float], largest: float) -> str:
    """Text with each token shaded by its value, from none at 0 to full at `largest`; the value itself is its tooltip."""
    out = []
    for piece, value in zip(pieces, values, strict=True):
        if value <= 0 or largest <= 0:
            out.append(escape(piece))
            continue
        part = min(1.0, value / largest)
        out.append(shaded(piece, part, f"{value:.3g}, {part:.0%} of the maximum"))
    return "".join(out)


def origin(card: Card) -> str:
    """Its explanation, and who wrote it; why there is none where an explainer failed."""
    explanation = card.explanation
    if explanation is None:
        return ""
    if explanation.state != "valid":
        return f'<p class="empty">{escape(explanation.method)} found no label: {escape(explanation.reason)}</p>'
    text = f"<p>{escape(explanation.explanation)}</p>" if explanation.explanation != explanation.title else ""
    return f'{text}<p class="by">{escape(card.source)}</p>'


def facts(card: Card) -> str:
    """How often and how strongly it fires."""
    pairs = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in card.facts)
    return f'<dl class="facts">{pairs}</dl>'


def measured(card: Card) -> str:
    """Its histogram, the tokens that it raises and lowers, and its sentences."""
    statistics = card.statistics
    words = _words("Raises", statistics.promoted, "up") + _words("Lowers", statistics.suppressed, "down")
    return _histogram(card) + words + _sentences(card.sentences, statistics.max)


def _histogram(card: Card) -> str:
    """Firing tokens by activation: bars over bins that double, heights by the logarithm of the count."""
    counts = card.statistics.histogram
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return ""
    first, last = filled[0], filled[-1]
    tallest = math.log1p(max(counts))
    heights = {i: math.log1p(counts[i]) / tallest for i in range(first, last + 1)}
    bars = "".join(
        f'<i style="--h:{height:.3f}" title="{counts[i]:,} tokens from {_edge(i)} to {_edge(i + 1)}"></i>'
        for i, height in heights.items()
    )
    return (
        f'<figure class="histogram"><div class="bars">{bars}</div><figcaption><span>{_edge(first)}</span>'
        f"<span>activation, log count</span><span>{_edge(last + 1)}</span></figcaption></figure>"
    )


def _edge(index: int) -> str:
    return f"{2.0 ** (HISTOGRAM_FIRST_EXPONENT + index):.3g}"


def _words(name: str, words: Sequence[str], kind: str) -> str:
    if not words:
        return ""
    chips = "".join(f"<span>{escape(word.strip()) or '␣'}</span>" for word in words[:10])
    return f'<div class="words {kind}"><h3>{name}</h3><p>{chips}</p></div>'


def _sentences(sentences: Sequence[TopSentence], largest: float) -> str:
    if not sentences:
        return f'<p class="empty">It {NOT_SHOWN}.</p>' if largest > 0 else ""
    items = [
        f'<li><p class="text">{tokens(s.tokens, s.activations, largest)}</p>'
        f'<p class="by"><b>{s.value:.3g}</b> {escape(s.document)}{" · " + escape(s.label) if s.label else ""}</p></li>'
        for s in sentences
    ]
    shown, others = "".join(items[:N_OPEN]), "".join(items[N_OPEN:])
    n = len(items) - N_OPEN
    more = f"<summary>{n} more sentence{'s' if n > 1 else ''}</summary>"
    folded = f'<details>{more}<ol class="sentences">{others}</ol></details>' if others else ""
    return f'<h3>Fires most in</h3><ol class="sentences">{shown}</ol>{folded}'

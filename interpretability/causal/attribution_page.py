"""The page of an attribution, in the look of the report: one HTML file that needs no server and no network."""

from collections.abc import Mapping
from typing import Any

from interpretability.causal.attribution_report import Found, asked
from interpretability.pages.page import render
from interpretability.pages.report_features import SentencePool, differing, joined, said

SENTENCES = 4


def page(record: Mapping[str, Any], found: Found) -> str:
    """The page of the record; `found` has the evidence of the features in its grid."""
    pool = SentencePool()
    cards = [_card(found, row["sae"], row["latent"], pool) for row in record["grid"]]
    data = dict(record) | {"asked": asked(record), "cards": cards, "pool": pool.columns()}
    title = f"{record['prompt']} → {record['objective'].get('answer', 'next token')}"
    styles, scripts = ("theme.css", "report.css", "attribution.css"), ("dom.js", "charts.js", "sentences.js", "attribution.js")
    return render("attribution.html", title, data, styles, scripts)


def _card(found: Found, sae: int, latent: int, pool: SentencePool) -> dict[str, Any]:
    """What is known of a latent: its explanation, and where it fires elsewhere."""
    known = found.known[sae]
    card: dict[str, Any] = {"explanation": said(known.explanations.get(latent))}
    if known.top is None:
        return card
    row = known.top.statistics(latent)
    sentences = differing(known.top.sentences(latent, known.top.aggregations[0]), SENTENCES)
    return card | {
        "max": row.max,
        "density": row.density,
        "promoted": joined(row.promoted),
        "suppressed": joined(row.suppressed),
        "examples": pool.add(sentences, row.max) if row.max > 0 else [],
    }

"""What a notebook shows of features, as HTML that brings its own style and needs no script."""

from collections.abc import Iterable, Sequence
from html import escape

from inference.card import Card
from inference.finding import Hit
from inference.web import evidence

STYLE = """<style>
.ls { max-width: 60em; line-height: 1.5 }
.ls .tok { background: rgba(217, 95, 14, calc(0.1 + var(--v) * 0.6)); border-radius: 3px }
.ls .text { white-space: pre-wrap; margin: 0.3em 0 }
.ls .by, .ls .empty, .ls dt { opacity: 0.65; font-size: 0.85em; margin: 0 0 0.4em }
.ls table { border-collapse: collapse; font-size: 0.9em }
.ls th, .ls td { text-align: left; padding: 1px 10px 1px 0; white-space: pre }
.ls .facts { display: flex; gap: 2em; margin: 0.5em 0 } .ls dd { margin: 0 }
.ls .histogram { margin: 0.5em 0; max-width: 30em }
.ls figcaption { display: flex; justify-content: space-between; font-size: 0.8em }
.ls .bars { display: flex; align-items: flex-end; gap: 2px; height: 48px }
.ls .bars i { flex: 1; height: calc(var(--h) * 100%); min-height: 2px; background: rgba(217, 95, 14, 0.75) }
.ls .words span { font-family: monospace; padding: 1px 6px; margin-right: 4px; border-radius: 4px }
.ls .words.up span { background: rgba(217, 95, 14, 0.16) }
.ls .words.down span { background: rgba(43, 106, 143, 0.18) }
.ls ol { list-style: none; padding: 0; margin: 0 } .ls h3 { font-size: 1em; margin: 0.8em 0 0.2em } .ls .words p { margin: 0 }
</style>
"""


def page(*parts: str) -> str:
    """The parts with the style that they need, which reaches nothing else."""
    return f'{STYLE}<div class="ls">{"".join(parts)}</div>'


def note(message: str) -> str:
    """A line above what is shown."""
    return f'<p class="by">{escape(message)}</p>'


def table(rows: Sequence[dict[str, object]]) -> str:
    """Rows as a table with a column for each key."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row.values()))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return f"<td>{escape(text)}</td>"


def text(shades: Iterable[tuple[str, float, str]]) -> str:
    """A text whose tokens are shaded: each piece, the strength of its background (0 to 1), and its tooltip."""
    spans = [evidence.shaded(piece, part, title) if part > 0 else escape(piece) for piece, part, title in shades]
    return f'<p class="text">{"".join(spans)}</p>'


def card(known: Card) -> str:
    """All that is known about one feature."""
    title = f"<h3>{known.feature.latent} · {escape(known.label) or 'no label'}</h3>"
    near = [("Writes in a similar direction", "cosine", known.neighbours)]
    near += [("Fires on the same tokens", "Jaccard index", known.coactive)] if known.coactive else []
    lists = [f"<h3>{name}</h3>{table(hit_rows(hits, unit))}" for name, unit, hits in near]
    return page(title, evidence.origin(known), evidence.facts(known), evidence.measured(known), *lists)


def hit_rows(hits: Sequence[Hit], value: str) -> list[dict[str, object]]:
    """Features that were found as rows of a table, their number under the heading `value`; sites where there are several."""
    several = len({hit.feature.site for hit in hits}) > 1
    tokens = any(hit.token for hit in hits)
    rows: list[dict[str, object]] = []
    for hit in hits:
        site: dict[str, object] = {"site": hit.feature.site} if several else {}
        token = {"token": hit.token} if tokens else {}
        rows.append(site | {"latent": hit.latent, value: hit.value} | token | {"label": hit.label})
    return rows

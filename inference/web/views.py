"""The app's pieces of HTML, as strings. Whatever comes from a user, a model or a corpus is escaped here."""

from collections.abc import Sequence
from html import escape

from inference.card import Card, card_of
from inference.finding import Hit, hit
from inference.row import Row
from inference.session import Feature, Session
from inference.web import evidence
from inference.web.evidence import tokens
from inference.web.workbench import Snapshot

TABLESS = ' tabindex="-1"'
"""An attribute of buttons that the Tab key passes by."""


def note(message: str) -> str:
    """A sentence in the place of something that is not there."""
    return f'<p class="empty">{escape(message)}</p>'


def no_card(error: str = "") -> str:
    """The place of the card while no feature is open, or where it could not be opened."""
    said = status(error, "error") if error else ""
    return (
        f'<div class="nothing">{said}<p>Open a feature to read what it responds to: the sentences in which it fires most, the '
        "words that it raises, and its neighbours.</p><p>The texts that you generate are then shaded by it.</p></div>"
    )


def named(session: Session, feature: Feature, action: str) -> str:
    """Attributes by which a click says what to do (`open`, `steer`) with which feature; the first SAE needs no site."""
    site = "" if feature.site == session.needs_features().site else f' data-site="{escape(feature.site)}"'
    return f'data-{action}="{feature.latent}"{site}'


def where(session: Session, feature: Feature) -> str:
    """The feature's site, where the page has features of several."""
    return f'<span class="where">{escape(feature.site)}</span>' if len(session.features) > 1 else ""


def edits_hint(session: Session, text: str, starters: Sequence[Hit]) -> str:
    """The heading of the edits, and where there are none yet how to begin."""
    chips = "".join(
        f'<button {named(session, one.feature, "steer")} title="Steer with feature {one.latent}{_strength(session, one)}">'
        f"{escape(one.label)}</button>"
        for one in starters
    )
    begin = f'<div class="examples">{chips}</div>' if chips else ""
    return f'<h2 class="section">Edits</h2>{note(text) if text else ""}{begin}'


def _strength(session: Session, found: Hit) -> str:
    best = session.at(found.feature.site).best_strengths.get(found.latent)
    return f" at {round(best, 2):g} × its maximum, as measured" if best else ""


def results(session: Session, hits: Sequence[Hit], query: str) -> str:
    """The list of features found for `query`; each can be opened, and added to the edits.

    It is one stop of the Tab key: arrows go through it, + steers (`masthead.js`).
    """
    items = []
    for i, one in enumerate(hits):
        token = f'<span class="where">on “{escape(one.token.strip())}”</span>' if one.token.strip() else ""
        steerable = float(session.at(one.feature.site).max_values[one.feature.latent]) > 0
        meter = f'<span class="meter" style="--v:{max(0.0, one.value):.3f}" title="{one.value:.2f}"></span>'
        plus = _plus(session, one.feature) if steerable else ""
        items.append(f"<li>{_opens(session, one, token, meter, tab=i == 0)}{plus}</li>")
    return f'<ol class="hits" data-query="{escape(query)}">{"".join(items)}</ol>'


def _opens(session: Session, found: Hit, below: str = "", beside: str = "", tab: bool = True) -> str:
    """A feature as a button that opens it, reached by the Tab key or not."""
    label = escape(found.label) or "<i>no label</i>"
    names = named(session, found.feature, "open") + ("" if tab else TABLESS)
    return (
        f'<button class="hit" {names}><span class="num">{found.feature.latent}</span>'
        f'<span class="label">{label}{below}</span>{beside}</button>'
    )


def _plus(session: Session, feature: Feature) -> str:
    return (
        f'<button class="plus" {named(session, feature, "steer")}{TABLESS} aria-label="Steer with feature {feature.latent}" '
        'title="Steer with it">+</button>'
    )


def card(session: Session, feature: Feature) -> str:
    """Everything known about one feature."""
    known = card_of(session.at(feature.site), feature.latent)
    coactive = _near(session, "Fires on the same tokens", "Jaccard index", known.coactive) if known.coactive else ""
    parts = [
        f'<article class="card" {named(session, feature, "latent")}><header><span class="num big">{feature.latent}</span>'
        f"<h2>{escape(known.label) or 'No label'}{where(session, feature)}</h2></header>",
        evidence.origin(known),
        evidence.facts(known),
        _steer_button(session, known) if known.statistics.max > 0 else note("It never fired on the corpus."),
        evidence.measured(known),
        _near(session, "Writes in a similar direction", "cosine", known.neighbours),
        coactive,
        "</article>",
    ]
    return "".join(parts)


def _steer_button(session: Session, card: Card) -> str:
    best = card.best_strength
    measured = f" <span>at {round(best, 2):g} × its maximum, the most that stayed readable when measured</span>" if best else ""
    return f'<button class="steer" {named(session, card.feature, "steer")}>Steer with this feature{measured}</button>'


def _near(session: Session, title: str, unit: str, hits: Sequence[Hit]) -> str:
    items = [_opens(session, one, beside=f'<span class="cos" title="{unit}">{one.value:.2f}</span>') for one in hits]
    return f'<h3>{title}</h3><ol class="hits near">{"".join(f"<li>{item}</li>" for item in items)}</ol>'


def columns(session: Session, snapshot: Snapshot | None, lens: Feature | None, heats: Sequence[Sequence[float]] = ()) -> str:
    """Baseline and steered side by side. `heats`: values of feature `lens` per token, baseline rows before steered ones."""
    if snapshot is None:
        return (
            '<div class="sides idle"><section class="side baseline"><h3>Baseline</h3><p class="empty">The model as it is.</p>'
            '</section><section class="side steered"><h3>Steered</h3><p class="empty">The same prompt and the same random '
            "numbers, with your edits.</p></section></div>"
        )
    largest = float(session.at(lens.site).max_values[lens.latent]) if lens is not None else 0.0
    rows = [*snapshot.baseline, *(snapshot.steered or ())]
    shown = [_row(session, row, heats[i] if heats else None, largest) for i, row in enumerate(rows)]
    n = len(snapshot.baseline)
    steered = "".join(shown[n:]) or '<p class="empty">No edit changes anything: add a feature and move its strength.</p>'
    busy = ' aria-busy="true"' if snapshot.running else ""
    return (
        f'<div class="sides"{busy}><section class="side baseline"><h3>Baseline</h3>{"".join(shown[:n])}</section>'
        f'<section class="side steered"><h3>Steered</h3>{steered}</section></div>'
    )


def _row(session: Session, row: Row, values: Sequence[float] | None, largest: float) -> str:
    if values is None:
        body = f'<span class="given">{escape(row.prompt)}</span><span class="new">{escape(row.text)}</span>'
    else:
        pieces = session.tokenizer.pieces(row.ids[session.lead :])
        cut = row.prompt_length - session.lead
        body = (
            f'<span class="given">{tokens(pieces[:cut], values[:cut], largest)}</span>'
            f'<span class="new">{tokens(pieces[cut:], values[cut:], largest)}</span>'
        )
    return f'<p class="text">{body}</p>'


def legend(session: Session, lens: Feature) -> str:
    """What the shading of the texts means."""
    features = session.at(lens.site)
    label = escape(features.label(lens.latent)) or "no label"
    return (
        f'<div class="legend"><span>Shading: <b class="num">{lens.latent}</b> {label}{where(session, lens)}, '
        "read on the unsteered model</span>"
        f'<span class="scale"><i></i>0 to {float(features.max_values[lens.latent]):.3g}</span></div>'
    )


def edit_title(session: Session, feature: Feature) -> str:
    """The heading of one edit."""
    features = session.at(feature.site)
    return _opens(session, hit(features, feature.latent, 0.0), where(session, feature))


def status(text: str, kind: str = "") -> str:
    """The line below the buttons: what goes on, or what went wrong (`kind` "error"); "busy" moves."""
    return f'<p class="status {kind}" role="status">{escape(text)}</p>' if text else ""


def progress(snapshot: Snapshot) -> str:
    """How far a generation is, as a status line."""
    rate = snapshot.new_tokens / max(snapshot.seconds, 1e-3)
    what = "Writing… " if snapshot.running else "Stopped. " if snapshot.stopped else ""
    return status(f"{what}{snapshot.new_tokens} tokens, {rate:.0f} a second", "busy" if snapshot.running else "")


def transcript(messages: Sequence[tuple[str, str]]) -> str:
    """A conversation: (role, text) in order."""
    if not messages:
        return '<div class="chat"><p class="empty">Say something. The edits of this page apply to every answer.</p></div>'
    items = "".join(f'<div class="turn {role}"><p>{escape(text) or "…"}</p></div>' for role, text in messages)
    return f'<div class="chat" aria-live="polite">{items}</div>'


KEYS = (
    ("/", "search"),
    ("↓ ↑", "go through what was found"),
    ("Enter", "open the feature"),
    ("+", "steer with it"),
    ("Ctrl Enter", "generate, or send"),
    ("Esc", "stop"),
    ("?", "this list"),
)


def masthead(session: Session) -> str:
    """Name, what is loaded, the keys, and the switch between light and dark."""
    n_parameters = sum(p.numel() for p in session.model.parameters())
    facts = [escape(session.name), f"{n_parameters / 1e6:.1f} M parameters", f"context {session.context:,}"]
    for features in session.features:
        facts += [f"{features.n_latents:,} features at {escape(features.site)}", f"k {features.sae.cfg.k}"]
    spans = "".join(f"<span>{fact}</span>" for fact in facts)
    keys = "".join(f"<div><dt><kbd>{key}</kbd></dt><dd>{what}</dd></div>" for key, what in KEYS)
    return (
        f'<header class="masthead"><div><h1>Feature workbench</h1><p class="loaded">{spans}</p></div>'
        '<nav><a href="#find">Find</a><a href="#steer">Steer</a><a href="#read">Read</a>'
        f'<details class="keys"><summary>Keys</summary><dl>{keys}</dl></details>'
        '<button class="theme" aria-label="Switch between light and dark">◐</button></nav></header>'
    )


def tabs(panels: Sequence[str]) -> str:
    """A button for each panel, the first one chosen; `app.css` hides the panels that are not."""
    buttons = "".join(
        f'<button role="tab" aria-controls="panel-{panel.lower()}" aria-selected="{str(i == 0).lower()}" '
        f'tabindex="{-min(i, 1)}">{panel}</button>'
        for i, panel in enumerate(panels)
    )
    return f'<div class="panels" role="tablist">{buttons}</div>'


def fold(title: str) -> str:
    """A heading that shows what stands below it; `app.css` hides that until it was pressed."""
    return f'<button class="fold" aria-expanded="false">{title}</button>'


def examples(prompts: Sequence[str]) -> str:
    """Prompts to start from."""
    chips = "".join(f'<button data-prompt="{escape(prompt)}">{escape(prompt)}</button>' for prompt in prompts)
    return f'<div class="examples"><span>Try</span>{chips}</div>'

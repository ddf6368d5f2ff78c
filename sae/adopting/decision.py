"""Which candidate is taken: what explains most, unless the files name one that explains as much; or none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sae.adopting.candidates import Candidate, Convention, same_value

CHANCE = 0.8
"""A candidate must leave less than this share of what the SAE leaves with its coordinates shuffled, or the mean does."""
TIE = 0.03
"""Candidates whose FVU exceeds the lowest by at most this share of it explain as much."""
NEAR_TIE = 0.005
"""The same between conventions at one site, which are compared on the same rows, where the layout says neither."""
FIRST_TIE = 0.25
"""The same for the FVU of the first tokens of texts, of which there are few."""
L0_FACTOR = 2.0
"""Greatest ratio of a measured L0 and the one that is stated."""


@dataclass(frozen=True)
class Measured:
    """A candidate with its figures."""

    candidate: Candidate
    fvu: float
    l0: float
    chance: float = math.nan
    """FVU of the same SAE with its coordinates shuffled."""
    fvu_first: float = math.nan
    """FVU of the first tokens of texts."""
    ce_recovered: float = math.nan

    @property
    def site(self) -> str:
        return self.candidate.reading.site


class Stated(NamedTuple):
    """What files, card or user say; empty or None where they do not."""

    sites: tuple[str, ...] = ()
    bos: str = ""
    text: str = ""
    l0: float | None = None


class Decision(NamedTuple):
    """The candidate taken, and why: a sentence each for place, convention, BOS and text."""

    chosen: Measured
    why: dict[str, str]


class Undecided(ValueError):
    """Nothing fits, or several things do."""


def agrees(l0: float, stated: float | None) -> bool:
    """Whether a measured L0 is about the stated one."""
    return stated is None or (l0 > 0 and max(l0 / stated, stated / l0) <= L0_FACTOR)


def decide(measured: Sequence[Measured], stated: Stated, usual: tuple[str, str]) -> Decision:
    """What to take of `measured`; `usual` are the model's own BOS policy and plain text, where nothing else decides.
    Undecided says what was found and which flag settles it.
    """
    sound = [one for one in measured if one.fvu < CHANCE * min(1.0, one.chance)]
    if not sound:
        best = min(measured, key=lambda one: one.fvu)
        raise Undecided(
            f"undecided: no candidate explains more of the rows than chance; the best, {describe(best.candidate)}, leaves "
            f"{best.fvu:.3f} of their variance, and with its coordinates shuffled {best.chance:.3f}. Is it of this model?"
        )
    fitting = [one for one in sound if agrees(one.l0, stated.l0)]
    if not fitting:
        best = min(sound, key=lambda one: one.fvu)
        raise Undecided(
            f"undecided: {stated.l0:g} active latents per token are stated, but {describe(best.candidate)} has {best.l0:.1f}, "
            "and no other candidate comes nearer; check the card, or give --l0 0"
        )
    use, why = _use(fitting, stated)
    same = [one for one in fitting if (one.site, one.candidate.convention) == use]
    return _reading(same, stated, usual, why)


def _use(fitting: Sequence[Measured], stated: Stated) -> tuple[tuple[str, Convention], dict[str, str]]:
    """Site and convention, each at the reading that suits it best."""
    best: dict[tuple[str, Convention], Measured] = {}
    for one in sorted(fitting, key=lambda one: one.fvu):
        best.setdefault((one.site, one.candidate.convention), one)
    lowest = min(one.fvu for one in best.values())
    tied = [one for one in best.values() if one.fvu <= (1 + TIE) * lowest]
    named = {same_value(site) for site in stated.sites}
    at_named = [one for one in tied if same_value(one.site) in named]
    if named and not at_named:
        found = min(tied, key=lambda one: one.fvu)
        raise Undecided(
            f"undecided: the files name {' or '.join(stated.sites)}, but {describe(found.candidate)} fits better (fvu "
            f"{found.fvu:.3f}); give --site to settle it"
        )
    tied = at_named or tied
    fewest = min(one.candidate.convention.departures for one in tied)
    simplest = [one for one in tied if one.candidate.convention.departures == fewest]
    if fewest and len({one.site for one in simplest}) == 1:
        lowest = min(one.fvu for one in simplest)
        simplest = [one for one in simplest if one.fvu <= (1 + NEAR_TIE) * lowest]
    if len(simplest) > 1:
        simplest = _by_ce(simplest)
    if len(simplest) > 1:
        several = "; ".join(describe(one.candidate) for one in simplest)
        differ = "--site" if len({one.site for one in simplest}) > 1 else "--norm or --bias"
        raise Undecided(f"undecided between {several}: their figures are alike; give {differ} to settle it")
    chosen = simplest[0]
    site = "named by the files, and fits best" if named else "fits best of all sites"
    convention = "as its layout says" if not chosen.candidate.convention.departures else "not as its layout says, but fits best"
    return (chosen.site, chosen.candidate.convention), {"site": site, "convention": convention}


def _by_ce(tied: list[Measured]) -> list[Measured]:
    """Those of candidates with equal FVU whose cross-entropy recovered is highest, within TIE."""
    known = [one for one in tied if math.isfinite(one.ce_recovered)]
    if not known:
        return tied
    highest = max(one.ce_recovered for one in known)
    return [one for one in known if one.ce_recovered >= highest - TIE]


def _reading(same: Sequence[Measured], stated: Stated, usual: tuple[str, str], why: dict[str, str]) -> Decision:
    """Text by FVU, then BOS by that of the first tokens, which it changes most. Where two fit alike this is said, and what the
    files or else the model say is taken.
    """
    by_text = {text: min(fvus) for text, fvus in _grouped(same, "text", "fvu").items()}
    text, why["text"] = _taken(by_text, TIE, stated.text, usual[1])
    same = [one for one in same if one.candidate.reading.text == text]
    of_first = all(math.isfinite(one.fvu_first) for one in same)
    by_bos = {bos: min(fvus) for bos, fvus in _grouped(same, "bos", "fvu_first" if of_first else "fvu").items()}
    bos, why["bos"] = _taken(by_bos, FIRST_TIE if of_first else TIE, stated.bos, usual[0])
    return Decision(next(one for one in same if one.candidate.reading.bos == bos), why)


def _grouped(measured: Sequence[Measured], part: str, figure: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for one in measured:
        found.setdefault(getattr(one.candidate.reading, part), []).append(getattr(one, figure))
    return found


def _taken(figures: dict[str, float], tie: float, said: str, own: str) -> tuple[str, str]:
    """The value of least FVU, and why; of those that are as low within `tie`, what is `said`, else the model's `own`."""
    tied = [value for value in figures if figures[value] <= (1 + tie) * min(figures.values())]
    best = min(figures, key=lambda value: figures[value])
    compared = ", ".join(f"{value} {figures[value]:.3f}" for value in sorted(figures))
    if len(figures) == 1:
        return best, "given, or the only one"
    if len(tied) > 1:
        for value, source in ((said, "as the files say"), (own, "as the model is used")):
            if value in tied:
                return value, f"undecided ({compared}); {source}"
        return best, f"undecided ({compared}); the best"
    return best, f"fits best ({compared})" + (f", though the files say {said}" if said and said != best else "")


def describe(candidate: Candidate) -> str:
    reading, convention = candidate
    return f"{reading.site}, BOS {reading.bos}, {reading.text} text, {convention}"


def table(measured: Sequence[Measured], chosen: Measured | None, n: int = 12) -> str:
    """The best candidates as lines of text, the one taken marked."""
    order = sorted(measured, key=lambda one: one.fvu)[:n]
    if chosen is not None and chosen not in order:
        order.append(chosen)
    rows: list[tuple[str, ...]] = [("", "site", "BOS", "text", "tensors", "FVU", "chance", "first", "L0", "CE recovered")]
    for one in order:
        reading, convention = one.candidate
        figures = (f"{value:.3f}" if math.isfinite(value) else "-" for value in (one.fvu, one.chance, one.fvu_first))
        ce = f"{one.ce_recovered:.3f}" if math.isfinite(one.ce_recovered) else "-"
        mark = "*" if one is chosen else ""
        rows.append((mark, *reading, str(convention), *figures, f"{one.l0:.1f}", ce))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def with_ce(one: Measured, value: float) -> Measured:
    return replace(one, ce_recovered=value)

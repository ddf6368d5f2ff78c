"""Candidates measured: all sites and conventions on few rows, the best of them on more rows, at every way to read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llama3.chat import has_chat
from sae.adopting.candidates import Candidate, Convention, Reading, Rows, conventions, meant, shuffled, sites_of
from sae.adopting.decision import Measured, Stated, with_ce
from sae.adopting.measuring import Batch, Losses, Reader, fit
from sae.model import SAE

SCREEN_ROWS = 512
BIASES_OF, FINALISTS = 12, 6
FEWEST_FIRST = 20
"""First tokens without which nothing is said of them: where BOS is missing they may all be of abnormal norm."""
CE_CANDIDATES, CE_TOKENS = 3, 2000
"""Candidates whose cross-entropy is measured, since each costs the model a pass, and tokens predicted in it, about."""

Use = tuple[str, Convention]
AS_READ = Convention()


@dataclass(frozen=True)
class Given:
    """What the user decided; an empty string is no decision."""

    site: str = ""
    bos: str = ""
    text: str = ""
    convention: Convention = AS_READ


class Found(NamedTuple):
    """All that was measured, and what normalisation depends on at each reading."""

    measured: list[Measured]
    rows: dict[Reading, Rows]


def stated(sae: SAE, given: Given, l0: float | None) -> Stated:
    """What the files and the user say of the SAE. `l0` None: what the files say; 0: nothing."""
    facts = sae.cfg.provenance
    sites = [given.site] if given.site else [facts.get("site"), *facts.get("site_candidates", [])]
    of_files = None if sae.selects_top_k or sae.cfg.k == 1 else float(sae.cfg.k)  # readers give 1 where a layout has none
    return Stated(
        sites=tuple(dict.fromkeys(site for site in sites if site)),
        bos=given.bos or str(facts.get("bos") or ""),
        text=given.text,
        l0=of_files if l0 is None else l0 or None,
    )


def search(reader: Reader, sae: SAE, given: Given, said: Stated, n_rows: int, seed: int) -> Found:
    """Measure the candidates that `given` leaves. ValueError where the SAE does not fit this model."""
    sites = sites_of(sae.cfg.provenance, reader.widths, sae.cfg.d_model, given.site)
    readings = _readings(reader, given)
    first = next((one for one in readings if one[0] == (said.bos or reader.tokenizer.bos_policy)), readings[0])
    uses = _screened(reader, sae, sites, first, given, seed)
    finalists = uses[:FINALISTS] + [use for use in uses[FINALISTS:] if use[0] in said.sites and not use[1].departures]
    measured, kept = [], {}
    for bos, text in readings:
        for site, rows in reader.rows(list(dict.fromkeys(use[0] for use in finalists)), bos, text, n_rows, seed).items():
            reading = Reading(site, bos, text)
            kept[reading] = rows._replace(x=rows.x[:0], first=rows.first[:0])
            for use in finalists:
                if use[0] == site:
                    measured.append(_measured(sae, Candidate(reading, use[1]), rows, seed))
    return Found(_with_ce(reader, sae, measured, kept), kept)


def _readings(reader: Reader, given: Given) -> list[tuple[str, str]]:
    """BOS and text. A chat begins with BOS unless the user says otherwise."""
    texts = [given.text] if given.text else ["plain", *["chat"] * has_chat(reader.tokenizer)]
    policies = [given.bos] if given.bos else ["none", "feed"]
    return [(bos, text) for text in texts for bos in policies if text == "plain" or bos == "feed" or given.bos]


def _screened(reader: Reader, sae: SAE, sites: Sequence[str], reading: tuple[str, str], given: Given, seed: int) -> list[Use]:
    """Sites and conventions, the best first: the meanings of the bias are compared for the best of the others alone."""
    rows = reader.rows(sites, *reading, SCREEN_ROWS, seed)

    def ranked(uses: Sequence[Use]) -> list[tuple[float, int, Use]]:
        fvus = [fit(meant(sae, convention, rows[site]), rows[site].x).fvu for site, convention in uses]
        return sorted(
            (fvu, convention.departures, (site, convention)) for fvu, (site, convention) in zip(fvus, uses, strict=True)
        )

    every = conventions(sae, given.convention)
    simple = [convention for convention in every if convention.bias == every[0].bias]
    first = ranked([(site, convention) for convention in simple for site in sites])
    best = [use for _, _, use in first[:BIASES_OF]]
    others = [
        (site, other)
        for site, convention in best
        for other in every
        if other._replace(bias=convention.bias) == convention != other
    ]
    return [use for _, _, use in sorted(first + ranked(others))]


def _measured(sae: SAE, candidate: Candidate, rows: Rows, seed: int) -> Measured:
    this = meant(sae, candidate.convention, rows)
    found, chance = fit(this, rows.x), fit(shuffled(this, seed), rows.x)
    first = rows.x[rows.first]
    fvu_first = fit(this, first).fvu if len(first) >= FEWEST_FIRST else math.nan
    return Measured(candidate, found.fvu, found.l0, chance.fvu, fvu_first)


def _with_ce(reader: Reader, sae: SAE, measured: list[Measured], rows: dict[Reading, Rows]) -> list[Measured]:
    """Cross-entropy recovered of the best site and convention, and of the next ones, each at its best reading."""
    order = sorted(range(len(measured)), key=lambda i: measured[i].fvu)
    seen: set[Use] = set()
    losses: dict[tuple[str, str], Losses] = {}
    for i in order:
        (reading, convention), use = measured[i].candidate, (measured[i].site, measured[i].candidate.convention)
        if use in seen or len(seen) == CE_CANDIDATES:
            continue
        seen.add(use)
        text = (reading.bos, reading.text)
        if text not in losses:
            losses[text] = Losses(reader, _some(list(reader.batches(*text))))
        this = meant(sae, convention, rows[reading])
        measured[i] = with_ce(measured[i], losses[text].recovered(this, reading.site, rows[reading].max_norm))
    return measured


def _some(batches: list[Batch]) -> list[Batch]:
    """Batches of texts of middle length, of about CE_TOKENS tokens."""
    chosen, tokens = [], 0
    for batch in batches[len(batches) // 2 :]:
        chosen.append(batch)
        tokens += int(batch.counts.sum())
        if tokens >= CE_TOKENS:
            break
    return chosen

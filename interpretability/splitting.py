"""Feature splitting: which latents of a large SAE each latent of a small one became.

    python -m interpretability.splitting --small A/sae --large B/sae --out splitting/
    python -m interpretability.splitting --small A/sae --large B/sae --activations acts/ --out splitting/ \\
        --small-explanations A/explanations --large-explanations B/explanations

Each large latent descends from the small latent whose decoder row is nearest, where their cosine is at least --min-cosine;
else it is new. A small latent with one descendant was kept, with several it was split, with none it is gone (Bricken et al.,
"Towards Monosemanticity", 2023, describe the splitting of features as dictionaries grow). With --activations the tokens say
whether directions that look alike fire alike: how often a latent fires with its parent, and how much of the parent's firing its
descendants cover together.

Shapes: S latents of the small SAE, L of the large one, D model width, H activations above zero.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from capture.store import Activations, Chunk, open_activations
from core.artifact import Artifact, building, check_provenance, open_artifact
from core.cli import Progress, StageConfig, run_stage
from core.norms import unit_rows
from core.runtime import Runtime
from interpretability.evidence.firing import firing
from interpretability.opening import open_explanations_of
from interpretability.records import Explanation, parquet_bytes, title_of
from interpretability.top_sentences import parts_of, usable_tokens
from sae.model import SAE, load

SPLITTING_FILE, SUMMARY_FILE = "splitting.parquet", "splitting.md"
BLOCK_LATENTS = 4096
SHOWN_CHILDREN = 8
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Where else the line between descendants and new latents could be drawn: the counts hang on it."""
SCHEMA = pa.schema(
    {
        "large": pa.int32(),
        "parent": pa.int32(),
        "cosine": pa.float32(),
        "descends": pa.bool_(),
        "fires": pa.int64(),
        "with_parent": pa.int64(),
        "title": pa.string(),
        "parent_title": pa.string(),
    }
)

log = logging.getLogger("interpretability.splitting")


@dataclass(frozen=True, kw_only=True)
class SplittingConfig(StageConfig):
    """Flags of `python -m interpretability.splitting`."""

    small: Path
    """Folder of the smaller SAE."""
    large: Path
    """Folder of the larger SAE, of the same model and site."""
    out: Path
    """Folder to write."""
    activations: Path | None = None
    """Folder of stored activations of that site. None: directions alone, no firing."""
    small_explanations: Path | None = None
    """Explanations of the small SAE's latents, for titles."""
    large_explanations: Path | None = None
    """The same of the large one."""
    min_cosine: float = 0.5
    """Least cosine of decoder rows at which a latent counts as a descendant."""
    tokens: int = 200_000
    """Tokens read from --activations, about, in whole chunks spread over the corpus; 0: all."""
    shown: int = 30
    """Small latents shown in the summary, those split best first."""

    def __post_init__(self) -> None:
        if not 0 < self.min_cosine < 1:
            raise ValueError(f"--min-cosine must be between 0 and 1; found {self.min_cosine}")
        if self.tokens < 0 or self.shown < 0:
            raise ValueError(f"--tokens and --shown must be at least 0; found {self.tokens} and {self.shown}")


class Parents(NamedTuple):
    """For each large latent (L,) the small one whose direction is nearest, and their cosine."""

    latents: Tensor
    cosines: Tensor


class Counts(NamedTuple):
    """What the tokens say; all int64."""

    tokens: int
    small: Tensor
    """(S,) tokens on which each small latent fires."""
    covered: Tensor
    """(S,) of these, those on which one of its descendants fires."""
    large: Tensor
    """(L,) tokens on which each large latent fires."""
    with_parent: Tensor
    """(L,) of these, those on which its parent fires."""


@torch.no_grad()
def parents_of(large: Tensor, small: Tensor) -> Parents:
    """Nearest row of `small` (S, D) for each row of `large` (L, D), by cosine; of equals the first."""
    unit = unit_rows(small.float())
    found = []
    for rows in torch.split(large, BLOCK_LATENTS):
        cosines = unit_rows(rows.float()) @ unit.T
        best = cosines.max(1).values
        # argmax promises nothing about ties.
        found.append(((cosines == best[:, None]).int().argmax(1), best))
    latents, cosines = (torch.cat(column) for column in zip(*found, strict=True))
    return Parents(latents, cosines)


def random_cosine(n_small: int, d_model: int, seed: int = 0) -> float:
    """Median cosine with the nearest of `n_small` random directions: what says nothing."""
    generator = torch.Generator().manual_seed(seed)
    small, large = torch.randn(n_small, d_model, generator=generator), torch.randn(256, d_model, generator=generator)
    return float(parents_of(large, small).cosines.median())


def count_firing(
    small: SAE, large: SAE, parents: Parents, descends: Tensor, chunks: Iterator[Chunk], device: torch.device
) -> Counts:
    """Read `chunks` with both SAEs. Tokens beyond the norm that either was trained on are left out, and without BOS the first
    of each sentence."""
    n_small, n_large = small.cfg.n_latents, large.cfg.n_latents
    max_norm = min(sae.cfg.provenance.get("max_norm") or math.inf for sae in (small, large))
    has_sink = large.cfg.provenance.get("bos") != "feed"
    tokens = 0
    fires_small, covered = torch.zeros(2, n_small, dtype=torch.int64, device=device)
    fires_large, with_parent = torch.zeros(2, n_large, dtype=torch.int64, device=device)
    parent, is_child = parents.latents.to(device), descends.to(device)
    for part in (part for chunk in chunks for part in parts_of(chunk)):
        x = part.activations[usable_tokens(part, max_norm, has_sink)].to(device)
        tokens += len(x)
        hits, own = firing(large, x), firing(small, x)
        # One number for a token and a small latent: of the small hits, and of the parents of the large ones.
        own_keys = own.rows * n_small + own.latents
        parent_keys = hits.rows * n_small + parent[hits.latents]
        fires_small += torch.bincount(own.latents, minlength=n_small)
        fires_large += torch.bincount(hits.latents, minlength=n_large)
        with_parent += torch.bincount(hits.latents[torch.isin(parent_keys, own_keys)], minlength=n_large)
        by_child = torch.isin(own_keys, parent_keys[is_child[hits.latents]])
        covered += torch.bincount(own.latents[by_child], minlength=n_small)
    return Counts(tokens, *(counts.cpu() for counts in (fires_small, covered, fires_large, with_parent)))


def run(config: SplittingConfig, runtime: Runtime) -> None:
    """Write the folder `config.out` of kind `splitting`."""
    small, large = load(config.small, runtime.device), load(config.large, runtime.device)
    _check_pair(config, small, large)
    activations = open_activations(config.activations, large.site) if config.activations else None
    inputs = [open_artifact(config.small, "sae"), open_artifact(config.large, "sae")]
    if activations:
        keys = ("model_hash", "tokenizer_hash", "site", "bos")
        check_provenance(f"activations {config.activations}", large.cfg.provenance, activations.provenance, keys)
        inputs.append(activations.artifact)
    titles = [
        _titles(sae, path, inputs) for sae, path in ((small, config.small_explanations), (large, config.large_explanations))
    ]
    provenance = {"small_hash": small.weights_hash, "large_hash": large.weights_hash, "site": large.cfg.provenance.get("site")}
    with building(config.out, "splitting", config, runtime, inputs, provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        names = []
        if runtime.is_main:
            parents = parents_of(large.W_dec, small.W_dec)
            descends = parents.cosines >= config.min_cosine
            counts = None
            if activations:
                chunks = _spread(activations, config.tokens, runtime)
                counts = count_firing(small, large, parents, descends, chunks, runtime.device)
            rows = pa.Table.from_pydict(_columns(parents, descends, counts, titles), SCHEMA)
            builder.publish(SPLITTING_FILE, parquet_bytes(SCHEMA, [rows]), rows=len(rows))
            builder.publish(SUMMARY_FILE, "".join(summary(config, small, parents, descends, counts, titles)).encode())
            names = [SPLITTING_FILE, SUMMARY_FILE]
        builder.finish(names, {"small": small.cfg.n_latents, "large": large.cfg.n_latents})
    log.info("%s: %s", config.out / SUMMARY_FILE, f"{large.cfg.n_latents:,} latents and their parents")


def _check_pair(config: SplittingConfig, small: SAE, large: SAE) -> None:
    keys = ("model_hash", "tokenizer_hash", "site", "d_model")
    wanted, found = (sae.cfg.provenance | {"d_model": sae.cfg.d_model} for sae in (small, large))
    check_provenance(f"SAE {config.large}", wanted, found, keys)
    if small.cfg.n_latents > large.cfg.n_latents:
        raise ValueError(
            f"--small {config.small} has {small.cfg.n_latents:,} latents, more than the {large.cfg.n_latents:,} of --large "
            f"{config.large}; give them the other way round"
        )


def _titles(sae: SAE, path: Path | None, inputs: list[Artifact]) -> Mapping[int, Explanation]:
    if path is None:
        return {}
    inputs.append(open_artifact(path, "explanations"))
    return open_explanations_of(sae, path)


def _spread(activations: Activations, tokens: int, runtime: Runtime) -> Iterator[Chunk]:
    """Chunks at equal distances over the corpus that hold about `tokens` tokens; 0: all."""
    share = min(1.0, tokens / activations.n_tokens) if tokens else 1.0
    n = max(1, round(share * len(activations)))
    with Progress("counting", n, "chunks", runtime) as bar:
        for i in range(n):
            yield activations.chunk(i * len(activations) // n)
            bar.update(1)


def _columns(
    parents: Parents, descends: Tensor, counts: Counts | None, titles: Sequence[Mapping[int, Explanation]]
) -> dict[str, Any]:
    found = parents.latents.tolist()
    nothing = [None] * len(found)
    return {
        "large": list(range(len(found))),
        "parent": found,
        "cosine": parents.cosines.tolist(),
        "descends": descends.tolist(),
        "fires": counts.large.tolist() if counts else nothing,
        "with_parent": counts.with_parent.tolist() if counts else nothing,
        "title": [title_of(titles[1].get(i)) for i in range(len(found))],
        "parent_title": [title_of(titles[0].get(i)) for i in found],
    }


def summary(
    config: SplittingConfig,
    small: SAE,
    parents: Parents,
    descends: Tensor,
    counts: Counts | None,
    titles: Sequence[Mapping[int, Explanation]],
) -> Iterator[str]:
    """The page to read, in Markdown."""
    n_small, n_large = small.cfg.n_latents, len(descends)
    children = torch.bincount(parents.latents[descends], minlength=n_small)
    gone, kept, split = int((children == 0).sum()), int((children == 1).sum()), int((children > 1).sum())
    yield f"# What {n_small:,} latents became in {n_large:,}\n\n"
    yield "| small latents | | |\n|---|---:|---:|\n"
    for name, n in (("split into several", split), ("kept as one", kept), ("gone", gone)):
        yield f"| {name} | {n:,} | {n / n_small:.1%} |\n"
    known = int(descends.sum())
    yield f"\n{known:,} of {n_large:,} large latents ({known / n_large:.1%}) descend from a small one: the cosine of their "
    yield f"decoder rows is at least {config.min_cosine:g}. The others are new. Median cosine with the nearest small latent: "
    yield f"{float(parents.cosines.median()):.3f}; of random directions: {random_cosine(n_small, small.cfg.d_model):.3f}.\n"
    yield "\n| cosine at least | descend | split | kept | gone |\n|---:|---:|---:|---:|---:|\n"
    for least in THRESHOLDS:
        near = parents.cosines >= least
        found = torch.bincount(parents.latents[near], minlength=n_small)
        numbers = (int(which.sum()) for which in (near, found > 1, found == 1, found == 0))
        yield f"| {least:g} | {' | '.join(f'{number:,}' for number in numbers)} |\n"
    if counts:
        yield from _agreement(counts, descends)
    order = sorted(range(n_small), key=lambda i: (-int(children[i] > 1), -_evidence(i, counts), -int(children[i]), i))
    yield "\n## Small latents and what they became\n\n"
    yield "*Covered*: share of the small latent's tokens on which one of its descendants fires. *With it*: share of a "
    yield "descendant's tokens on which the small latent fires. Of latents that were split, the best covered come first.\n"
    for latent in order[: config.shown]:
        yield from _family(latent, parents, descends, counts, titles)


def _evidence(latent: int, counts: Counts | None) -> float:
    """How much of what a small latent does its descendants do; 0 without tokens."""
    return float(counts.covered[latent] / counts.small[latent].clamp(min=1)) if counts else 0.0


def _agreement(counts: Counts, descends: Tensor) -> Iterator[str]:
    """What the tokens say of all families together."""
    own, covered = int(counts.small.sum()), int(counts.covered.sum())
    yield f"\nOn {counts.tokens:,} tokens, {covered / max(1, own):.1%} of the firing of small latents is covered: a descendant "
    yield "fires on the same token. "
    for name, which in (("a descendant", descends), ("a new latent", ~descends)):
        fires, together = int(counts.large[which].sum()), int(counts.with_parent[which].sum())
        yield f"Where {name} fires, its nearest small latent fires too in {together / max(1, fires):.1%} of cases. "
    base = float((counts.small.double() / max(1, counts.tokens)) @ counts.small.double()) / max(1, own)
    yield f"A small latent chosen without looking at directions, as often as it fires, would in {base:.1%}.\n"


def _family(
    latent: int,
    parents: Parents,
    descends: Tensor,
    counts: Counts | None,
    titles: Sequence[Mapping[int, Explanation]],
) -> Iterator[str]:
    members = ((parents.latents == latent) & descends).nonzero().squeeze(1).tolist()
    members.sort(key=lambda i: -float(parents.cosines[i]))
    covered = f", {_evidence(latent, counts):.0%} covered" if counts else ""
    yield f"\n**{latent}** {_cell(titles[0].get(latent))} ({len(members)} descendants{covered})\n\n"
    yield "| large | cosine | with it | title |\n|---:|---:|---:|---|\n"
    for i in members[:SHOWN_CHILDREN]:
        share = f"{int(counts.with_parent[i]) / max(1, int(counts.large[i])):.0%}" if counts else ""
        yield f"| {i} | {float(parents.cosines[i]):.2f} | {share} | {_cell(titles[1].get(i))} |\n"
    if len(members) > SHOWN_CHILDREN:
        yield f"| | | | and {len(members) - SHOWN_CHILDREN} more |\n"


def _cell(explanation: Explanation | None) -> str:
    """A title that cannot break out of its cell of a table."""
    return " ".join(title_of(explanation).split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    run_stage(SplittingConfig, run, __doc__ or "")

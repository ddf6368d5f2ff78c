"""A sample of the corpus, drawn by hash without regard to any latent, with everything that fires in it.

It is what top sentences are compared with (n-grams), where scores find sentences in which a latent does not fire, and where
latents that fire on the same tokens are counted.

Shapes: H activations above zero, L latents.
"""

from typing import Any, NamedTuple

import torch

from core.runtime import Runtime
from interpretability.evidence.selection import HASH_BITS, Hits, Sentences, cat_sentences, hashes, mixed

PAIRS_AT_ONCE = 1 << 23
"""Pairs of latents counted at once: 64 MiB of keys, and as much again to sort them."""


class Background(NamedTuple):
    """Sentences by ascending id, and the activations in them, by sentence and token."""

    sentences: Sentences
    hits: Hits


class Sampler:
    """Draws about `wanted` of `n_sentences` sentences: those whose hash of id and `seed` is small enough."""

    def __init__(self, wanted: int, n_sentences: int, seed: int) -> None:
        self._limit, self._seed = (1 << HASH_BITS) * wanted // max(n_sentences, 1), seed
        self._parts: list[Background] = []

    def add(self, hits: Hits, sentences: Sentences) -> None:
        """Take what falls into the sample."""
        # Another stream of hashes than those of the levels, which draw by latent.
        drawn = hashes(mixed(mixed(0, self._seed), -1), sentences.ids) < self._limit
        if not drawn.any():
            return
        mine = drawn.to(hits.rows.device)[hits.rows]
        row = (drawn.cumsum(0) - 1).to(hits.rows.device)
        found = Hits(hits.latents[mine], hits.values[mine], hits.positions[mine], row[hits.rows[mine]])
        kept = Hits(*(column.to("cpu") for column in found))
        self._parts.append(Background(sentences.take(drawn.nonzero().squeeze(1)), kept))

    def gathered(self, runtime: Runtime) -> Background | None:
        """The sample of all ranks, on every rank; None where it is empty."""
        parts = [part for rank in runtime.gather_objects(self._parts) for part in rank]
        return merged(parts) if parts else None


def merged(parts: list[Background]) -> Background:
    """One background of several, which hold no sentence twice."""
    sentences = cat_sentences([part.sentences for part in parts])
    rows = torch.cat([torch.searchsorted(sentences.ids, part.sentences.ids)[part.hits.rows] for part in parts])
    order = rows.argsort(stable=True)
    latents, values, positions = (
        torch.cat([part.hits[i] for part in parts])[order] for i in range(3)
    )  # the columns before `rows`
    return Background(sentences, Hits(latents, values, positions, rows[order]))


def cofiring(background: Background, n_latents: int, n: int) -> list[list[dict[str, Any]]]:
    """For each latent the `n` others with which it shares most: by Jaccard index of the tokens on which they fire, down, then
    by
    latent. `count` are the tokens on which both fire."""
    hits = background.hits
    nothing: list[list[dict[str, Any]]] = [[] for _ in range(n_latents)]
    if n == 0 or len(hits.latents) == 0:
        return nothing
    tokens = background.sentences.tokens.offsets[hits.rows] + hits.positions  # (H,), ascending
    _, token, k = torch.unique_consecutive(tokens, return_inverse=True, return_counts=True)
    starts = torch.cat([k.new_zeros(1), k.cumsum(0)])
    fires = torch.bincount(hits.latents, minlength=n_latents)
    order = hits.latents.argsort(stable=True)
    pairs_before = torch.cat([k.new_zeros(1), k[token[order]].cumsum(0)])
    latent_ends = fires.cumsum(0)
    first_latent = 0
    while first_latent < n_latents:
        begin = int(latent_ends[first_latent - 1]) if first_latent else 0
        limit = torch.searchsorted(pairs_before[latent_ends], pairs_before[begin] + PAIRS_AT_ONCE, right=True)
        last_latent = max(first_latent + 1, int(limit))
        rows = order[begin : int(latent_ends[last_latent - 1])]
        _count_block(hits.latents, rows, token, starts, fires, n, nothing)
        first_latent = last_latent
    return nothing


def _count_block(
    latents: torch.Tensor,
    rows: torch.Tensor,
    token: torch.Tensor,
    starts: torch.Tensor,
    fires: torch.Tensor,
    n: int,
    found: list[list[dict[str, Any]]],
) -> None:
    """Fill `found` for the latents of the hits `rows`, which are all hits of some latents, by latent."""
    counts = starts[token[rows] + 1] - starts[token[rows]]
    ends = counts.cumsum(0)
    source = torch.repeat_interleave(starts[token[rows]] - (ends - counts), counts) + torch.arange(int(counts.sum()))
    one, other = torch.repeat_interleave(latents[rows], counts), latents[source]
    keys, shared = torch.unique((one * len(fires) + other)[one != other], return_counts=True)
    one, other = keys // len(fires), keys % len(fires)
    jaccard = shared.double() / (fires[one] + fires[other] - shared)
    order = jaccard.argsort(descending=True, stable=True)  # equal ones stay in order of `other`
    order = order[one[order].argsort(stable=True)]
    one, other, shared, jaccard = one[order], other[order], shared[order], jaccard[order]
    kept = torch.arange(len(one)) - torch.searchsorted(one, one) < n
    for a, b, count, share in zip(*(column[kept].tolist() for column in (one, other, shared, jaccard)), strict=True):
        found[a].append({"latent": b, "count": count, "jaccard": share})

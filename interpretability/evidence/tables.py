"""From the running top N to the rows of Parquet: texts, names and token strings are looked up for the sentences that remain."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from capture.store import Corpus
from core.runtime import Runtime
from interpretability.evidence.background import Background
from interpretability.evidence.promoted import PromotedTokens
from interpretability.evidence.selection import (
    LatentTotals,
    Pairs,
    Ragged,
    Sentences,
    TopTable,
    bins_of,
    cat_pairs,
    cat_sentences,
    gathered,
    level_ranks,
    offsets_of,
    ranks,
)
from interpretability.records import (
    BACKGROUND_SCHEMA,
    COMPACT_SCHEMA,
    COUNTED,
    LEVEL,
    MEASURED_LATENT_SCHEMA,
    SHARED_SCHEMA,
    TOP_SCHEMA,
)
from llama3 import Tokenizer

LATENTS_PER_GROUP = 128
"""Latents in one row group of the file: what a reader decodes to see one latent."""


class TextLookup:
    """Strings for tokens and sentences."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.corpus, self._tokenizer = corpus, tokenizer
        self._strings: list[str | None] = [_decoded(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab)]
        self._whole = np.array([string is not None for string in self._strings])

    def pieces(self, tokens: Ragged) -> pa.ListArray:
        """list<string>: a string a token, which together read as the text (see `Tokenizer.pieces`)."""
        ids, offsets = tokens.values.numpy(), tokens.offsets.numpy()
        strings, codes = list(self._strings), ids.astype(np.int64)
        cut = np.unique(np.searchsorted(offsets, np.nonzero(~self._whole[ids])[0], side="right") - 1)
        for row in cut:  # a character cut between tokens: only the sentence as a whole can be decoded
            first, last = offsets[row], offsets[row + 1]
            codes[first:last] = np.arange(last - first) + len(strings)
            strings += self._tokenizer.pieces(ids[first:last].tolist())
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(strings, pa.string()).take(pa.array(codes)))


def _decoded(token: bytes) -> str | None:
    """A token's text; None where it is part of a character only."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def rows_of(table: TopTable, n_latents: int, runtime: Runtime, lookup: TextLookup) -> Iterator[pa.Table]:
    """The rows of all ranks, LATENTS_PER_GROUP latents at a time, on rank 0; empty tables on the others.

    A collective: every rank must exhaust it.
    """
    for first in range(0, n_latents, LATENTS_PER_GROUP):
        parts = runtime.gather_objects(table.between(first, first + LATENTS_PER_GROUP))
        held = [part for part in parts if part is not None]
        if not runtime.is_main or not held:
            yield TOP_SCHEMA.empty_table()
            continue
        pairs = cat_pairs([part[0] for part in held])
        sentences = cat_sentences([part[1] for part in held])
        yield _block(pairs.take(pairs.sentence_ids.argsort(stable=True)), sentences, table, lookup)


def _block(pairs: Pairs, sentences: Sentences, table: TopTable, lookup: TextLookup) -> pa.Table:
    """Rows by latent, aggregation and rank. `pairs` and `sentences` are in ascending order of sentence id."""
    by_aggregation = [ranks(pairs.latents, values) for values in pairs.scores]
    kept = [(rank < table.n).nonzero().squeeze(1) for rank in by_aggregation]
    if table.n_level:
        place, drawn = _level_order(pairs, table)
        kept.append(drawn)
        by_aggregation.append(place)
    pair = torch.cat(kept)
    aggregation = torch.cat([torch.full_like(rows, a) for a, rows in enumerate(kept)])
    rank = torch.cat([by_aggregation[a][rows] for a, rows in enumerate(kept)])
    order = torch.from_numpy(np.lexsort((rank.numpy(), aggregation.numpy(), pairs.latents[pair].numpy())))
    pair, aggregation, rank = pair[order], aggregation[order], rank[order]

    row = torch.searchsorted(sentences.ids, pairs.sentence_ids[pair])  # of the sentence in `sentences`
    take = pa.array(row.numpy())
    corpus = lookup.corpus
    ids = sentences.ids.tolist()
    values = torch.cat([pairs.scores, pairs.peaks[None]])  # the value of a level is the largest activation
    source, offsets = gathered(pairs.offsets, pair)
    positions, activations = Ragged(pairs.positions[source], offsets), Ragged(pairs.values[source], offsets)
    columns = {
        "latent": pa.array(pairs.latents[pair].numpy()),
        "aggregation": pa.array([*table.aggregations, LEVEL]).take(pa.array(aggregation.numpy())),
        "rank": pa.array(rank.int().numpy()),
        "value": pa.array(values[aggregation, pair].numpy()),
        "sentence_id": pa.array(pairs.sentence_ids[pair].numpy()),
        "document": pa.array(corpus.document_names(sentences.documents.tolist())).take(take),
        "label": pa.array(corpus.labels(ids), pa.string()).take(take),
        "text": pa.array(corpus.texts(ids), pa.string()).take(take),
        "tokens": lookup.pieces(sentences.tokens).take(take),
        "activations": _activations(positions, activations, sentences.tokens.lengths[row]),
    }
    return pa.table(columns, schema=TOP_SCHEMA)


def _level_order(pairs: Pairs, table: TopTable) -> tuple[torch.Tensor, torch.Tensor]:
    """The place (P,) of each pair in the sample of its latent, the highest level first, and which pairs are in the sample."""
    place = level_ranks(table.level_keys(pairs))
    drawn = (place < table.n_level).nonzero().squeeze(1)
    level = bins_of(pairs.peaks[drawn])
    order = torch.from_numpy(np.lexsort((place[drawn].numpy(), -level.numpy(), pairs.latents[drawn].numpy())))
    latents = pairs.latents[drawn[order]].contiguous()
    ordered = torch.empty_like(place)
    ordered[drawn[order]] = torch.arange(len(drawn)) - torch.searchsorted(latents, latents)
    return ordered, drawn


def _activations(positions: Ragged, values: Ragged, lengths: Tensor) -> pa.ListArray:
    """list<float32>: one value a token, 0 where the latent does not fire."""
    offsets = offsets_of(lengths)
    flat = torch.zeros(int(offsets[-1]))
    flat[torch.repeat_interleave(offsets[:-1], positions.lengths) + positions.values] = values.values
    return pa.ListArray.from_arrays(pa.array(offsets.int().numpy()), pa.array(flat.numpy()))


class Once:
    """Takes the sentences out of rows, each once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._kept = [SHARED_SCHEMA.empty_table()]

    def taken_from(self, rows: pa.Table) -> pa.Table:
        """`rows` of TOP_SCHEMA without the columns SHARED; what these say of sentences not seen before is kept."""
        ids, first = np.unique(rows["sentence_id"].to_numpy(), return_index=True)
        fresh = [int(at) for sentence_id, at in zip(ids.tolist(), first, strict=True) if sentence_id not in self._seen]
        self._seen.update(ids.tolist())
        self._kept.append(
            rows.select(SHARED_SCHEMA.names).take(pa.array(fresh, pa.int64()))
        )  # of an empty list Arrow knows no type
        return rows.select(COMPACT_SCHEMA.names)

    def table(self) -> pa.Table:
        """What was kept, by sentence id."""
        return pa.concat_tables(self._kept).sort_by("sentence_id").combine_chunks()


def background_rows(background: Background, lookup: TextLookup) -> pa.Table:
    """The rows of `background.parquet`, by sentence id."""
    sentences, hits = background
    ids = sentences.ids.tolist()
    offsets = pa.array(offsets_of(torch.bincount(hits.rows, minlength=len(ids))).int().numpy())
    lists = {"latents": hits.latents.int(), "positions": hits.positions.int(), "activations": hits.values}
    columns = {
        "sentence_id": pa.array(ids, pa.int64()),
        "document": pa.array(lookup.corpus.document_names(sentences.documents.tolist()), pa.string()),
        "label": pa.array(lookup.corpus.labels(ids), pa.string()),
        "text": pa.array(lookup.corpus.texts(ids), pa.string()),
        "tokens": lookup.pieces(sentences.tokens),
    } | {name: pa.ListArray.from_arrays(offsets, pa.array(column.numpy())) for name, column in lists.items()}
    return pa.table(columns, schema=BACKGROUND_SCHEMA)


def statistics_of(
    totals: LatentTotals,
    promoted: PromotedTokens,
    ngrams: Sequence[object],
    cofiring: Sequence[object],
    peak_variety: npt.NDArray[np.float32],
    counted: pa.Table | None = None,
) -> pa.Table:
    """The rows of `latents.parquet`, one for every latent, whether it fires or not.

    `counted`, of another text, takes the place of `totals`; of maxima the larger is kept.
    """
    firing = totals.firing
    columns: dict[str, Any] = {
        "latent": np.arange(len(firing), dtype=np.int32),
        "firing_count": firing.cpu().numpy(),
        "sentence_count": totals.sentences.cpu().numpy(),
        "max": totals.max.cpu().numpy(),
        "mean": totals.mean.cpu().numpy(),
        "density": (firing.double() / totals.tokens.clamp(min=1)).cpu().numpy(),
        "histogram": totals.histogram.tolist(),
        "promoted": promoted.promoted,
        "suppressed": promoted.suppressed,
        "ngrams": ngrams,
        "cofiring": cofiring,
        "shown_count": totals.sentences.cpu().numpy(),
        "peak_variety": peak_variety,
    }
    if counted is not None:
        largest = np.maximum(columns["max"], counted["max"].to_numpy())
        columns |= {name: counted[name] for name in COUNTED} | {"max": largest}
    return pa.table(columns, schema=MEASURED_LATENT_SCHEMA)

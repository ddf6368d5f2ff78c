"""Sentences of one chunk to token ids, and token ids to padded batches.

Shapes: n sentences of a chunk, N their tokens, B sentences of a batch, T tokens of its longest.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from llama3 import Tokenizer


class ChunkTokens(NamedTuple):
    """The tokens of a chunk: sentence i has `token_ids[offsets[i] : offsets[i + 1]]`; none where its text is empty."""

    sentence_ids: Tensor
    """(n,) int64."""
    document_ids: Tensor
    """(n,) int64."""
    token_ids: Tensor
    """(N,) int64."""
    offsets: Tensor
    """(n + 1,) int64."""
    truncated: int
    """Sentences cut to the greatest length."""

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()


def tokenise(table: pa.Table, tokenizer: Tokenizer, max_length: int) -> ChunkTokens:
    """Encode the sentences of `table`, each cut after `max_length` tokens, without special tokens."""
    token_ids: list[int] = []
    offsets = [0]
    truncated = 0
    for text in table["text"].to_pylist():
        ids = tokenizer.encode(text)
        truncated += len(ids) > max_length
        token_ids += ids[:max_length]
        offsets.append(len(token_ids))
    return ChunkTokens(
        sentence_ids=torch.from_numpy(table["sentence_id"].to_numpy().copy()),
        document_ids=torch.from_numpy(table["document_id"].to_numpy().copy()),
        token_ids=torch.tensor(token_ids, dtype=torch.long),
        offsets=torch.tensor(offsets),
        truncated=truncated,
    )


class Batch(NamedTuple):
    """Sentences of like length, padded on the right with token 0."""

    tokens: Tensor
    """(B, T) int64."""
    slots: Tensor
    """Where the real tokens stand in `tokens.flatten()`."""
    rows: Tensor
    """Which tokens of the chunk these are, one per slot."""


def batches(chunk: ChunkTokens, batch_tokens: int, max_padding: float) -> Iterator[Batch]:
    """Batches of at most `batch_tokens` slots, of which at most the share `max_padding` is padding; longest sentences first.

    A sentence that no other fits beside is a batch of its own. Depends on the chunk alone, so that the same sentences meet in a
    batch whatever the number of processes.
    """
    lengths, order = torch.sort(chunk.lengths, descending=True, stable=True)
    ends = lengths.cumsum(0)
    n_filled = int((lengths > 0).sum())
    start = 0
    while start < n_filled:
        T = int(lengths[start])
        stop = min(start + max(1, batch_tokens // T), n_filled)
        slots = T * torch.arange(1, stop - start + 1)
        tokens = ends[start:stop] - (ends[start] - T)
        # Lengths fall, so the share of padding grows with each sentence: those that fit come first.
        fitting = max(1, int((slots - tokens <= max_padding * slots).sum()))
        yield _batch(chunk, order[start : start + fitting], T)
        start += fitting


def _batch(chunk: ChunkTokens, sentences: Tensor, T: int) -> Batch:
    columns = torch.arange(T)
    rows = chunk.offsets[sentences, None] + columns  # (B, T)
    real = columns < chunk.lengths[sentences, None]
    tokens = chunk.token_ids[rows.clamp(max=len(chunk.token_ids) - 1)].masked_fill(~real, 0)
    return Batch(tokens, real.flatten().nonzero().squeeze(1), rows[real])

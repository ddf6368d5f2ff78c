"""One chunk of sentences through the model, and into a file.

Shapes: n sentences of the chunk, N their tokens, B sentences of a batch, T slots of its longest, D d_model.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from capture.batches import Batch, ChunkTokens, batches
from llama3 import Transformer

log = logging.getLogger("capture.activations")

STORAGE = {"bf16": torch.bfloat16, "fp32": torch.float32}
ABNORMAL_RATIO = 10  # a row is abnormal when its norm exceeds so many times the median norm of its chunk and site


class NonFinite(ValueError):
    """NaN or Inf in an activation."""


@dataclass(frozen=True, kw_only=True)
class ChunkCapture:
    """How chunks are captured; the same for all chunks of a run."""

    model: Transformer
    sites: Sequence[str]
    storage: Literal["bf16", "fp32"]
    batch_tokens: int
    """Slots of one forward pass, padding included."""
    max_padding: float
    """Greatest share of padding in a batch."""
    bos_id: int | None
    """Token fed before each sentence and not stored; None: no token."""
    skip_nonfinite: bool
    """Give a sentence with NaN or Inf no rows, instead of raising NonFinite."""


@dataclass
class CapturedChunk:
    """One chunk in memory, rows in order of sentence id."""

    tokens: ChunkTokens
    rows: dict[str, Tensor]
    """(N, D) of each site, in the type of storage."""
    norms: dict[str, Tensor]
    """(N,) float32 of each site."""
    counts: Counter[str] = field(default_factory=Counter)
    """slots and fed (tokens) of the forward passes; sentences truncated, empty, nonfinite."""


@torch.inference_mode()
def capture_chunk(how: ChunkCapture, chunk: ChunkTokens, before_batch: Callable[[], None]) -> CapturedChunk:
    """Run a chunk through the model. `before_batch` is called before each forward pass. Raises NonFinite."""
    device = how.model.device
    shape = (len(chunk.token_ids), how.model.params.dim)
    rows = {site: torch.empty(shape, dtype=STORAGE[how.storage], device=device) for site in how.sites}
    counts = Counter(fed=shape[0], truncated=chunk.truncated, empty=int((chunk.lengths == 0).sum()))
    for batch in batches(chunk, how.batch_tokens, how.max_padding):
        before_batch()
        places = batch.rows.to(device)
        for site, x in _forward(how, batch).items():
            rows[site][places] = x.to(STORAGE[how.storage])
        counts["slots"] += batch.tokens.numel()
    norms = {site: torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).cpu() for site, x in rows.items()}
    captured = CapturedChunk(chunk, {site: x.cpu() for site, x in rows.items()}, norms, counts)
    bad = _nonfinite_sentences(captured)
    for sentence, what in bad.items():
        if not how.skip_nonfinite:
            raise NonFinite(f"{what}; --nonfinite skip leaves such sentences out and counts them")
        log.warning("sentence %d is left out: %s", int(chunk.sentence_ids[sentence]), what)
    return _without(captured, list(bad)) if bad else captured


def _forward(how: ChunkCapture, batch: Batch) -> dict[str, Tensor]:
    """(real tokens of the batch, D) of each site.

    No mask is needed: padding stands on the right, where a causal model does not look from a real token. That keeps attention
    on its fast path.
    """
    tokens, slots = batch.tokens.to(how.model.device), batch.slots.to(how.model.device)
    stored_from = 0
    if how.bos_id is not None:
        tokens = torch.cat((tokens.new_full((len(tokens), 1), how.bos_id), tokens), dim=1)
        stored_from = 1
    captured = how.model.capture(tokens, sites=how.sites)
    return {site: x[:, stored_from:].flatten(0, 1)[slots] for site, x in captured.items()}


def _nonfinite_sentences(captured: CapturedChunk) -> dict[int, str]:
    """Sentences, by place in the chunk, that hold NaN or Inf at any site, with a description of the first."""
    tokens = captured.tokens
    found: dict[int, str] = {}
    for site, norms in captured.norms.items():
        suspects = (~norms.isfinite()).nonzero().squeeze(1)
        # The norm of finite values may overflow, so the values decide.
        rows = suspects[~captured.rows[site][suspects].isfinite().all(dim=1)]
        sentences = torch.searchsorted(tokens.offsets, rows, right=True) - 1
        for row, sentence in zip(rows.tolist(), sentences.tolist(), strict=True):
            place = f"sentence {int(tokens.sentence_ids[sentence])}, token {row - int(tokens.offsets[sentence])}"
            found.setdefault(sentence, f"{place}: NaN or Inf at site {site}")
    return found


def _without(captured: CapturedChunk, sentences: list[int]) -> CapturedChunk:
    """The chunk with no rows for these sentences, at any site."""
    tokens = captured.tokens
    lengths = tokens.lengths.index_fill(0, torch.tensor(sentences), 0)
    kept = (lengths > 0).repeat_interleave(tokens.lengths)  # (N,)
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    return CapturedChunk(
        tokens._replace(token_ids=tokens.token_ids[kept], offsets=offsets),
        {site: rows[kept] for site, rows in captured.rows.items()},
        {site: norms[kept] for site, norms in captured.norms.items()},
        captured.counts + Counter(nonfinite=len(sentences)),
    )


def encode(captured: CapturedChunk, site: str) -> bytes:
    """The file of one site, with the counts of the chunk in its header: they outlive a kill together with the rows."""
    tokens, norms = captured.tokens, captured.norms[site]
    abnormal = int((norms > ABNORMAL_RATIO * norms.median()).sum()) if len(norms) else 0
    tensors = {
        "activations": captured.rows[site],
        "token_ids": tokens.token_ids.int(),
        "sentence_ids": tokens.sentence_ids,
        "document_ids": tokens.document_ids,
        "offsets": tokens.offsets,
    }
    # One entry only: safetensors writes several in an order that changes from run to run.
    counts = json.dumps(captured.counts | Counter(abnormal=abnormal), sort_keys=True)
    return safetensors.torch.save(tensors, metadata={"counts": counts})


def read_counts(path: Path) -> Counter[str]:
    """The counts in the header of a file that `encode` made."""
    with safe_open(path, framework="pt") as file:
        return Counter(json.loads(file.metadata()["counts"]))

"""One chunk of sentences through the model, and into a file.

Shapes: n sentences of the chunk, N their tokens, B sentences of a batch, T slots of its longest, D width of a site.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from capture import tensorfile
from capture.batches import Batch, ChunkTokens, batches, tokenise
from capture.storage import Storage, StoredRows
from capture.store import Corpus
from llama3 import Tokenizer, Transformer
from llama3.sites import as_sites, check_sites

log = logging.getLogger("capture.activations")

ABNORMAL_RATIO = 10  # a row is abnormal when its norm exceeds so many times the median norm of its chunk and site


class NonFinite(ValueError):
    """NaN or Inf in an activation."""


@dataclass(frozen=True, kw_only=True)
class ChunkCapture:
    """How chunks are captured; the same for all chunks of a run."""

    model: Transformer
    sites: Sequence[str]
    storage: Storage
    batch_tokens: int
    """Slots of one forward pass, padding included."""
    max_padding: float
    """Greatest share of padding in a batch."""
    bos_id: int | None
    """Token fed before each sentence and not stored; None: no token."""
    skip_nonfinite: bool
    """Give a sentence with NaN or Inf no rows, instead of raising NonFinite."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", as_sites(self.sites))


@dataclass(frozen=True, kw_only=True)
class CorpusChunks:
    """A corpus, cut into chunks of consecutive sentences, and the model that they go through."""

    corpus: Corpus
    tokenizer: Tokenizer
    how: ChunkCapture
    model_name: str
    """As provenance records it."""
    max_length: int
    """Tokens after which a sentence is cut."""
    chunk_sentences: int

    def __len__(self) -> int:
        return -(-self.corpus.n_sentences // self.chunk_sentences)

    def sentences(self, index: int) -> range:
        """The sentences of chunk `index`."""
        first = index * self.chunk_sentences
        return range(first, min(first + self.chunk_sentences, self.corpus.n_sentences))

    def tokens(self, index: int) -> ChunkTokens:
        """Chunk `index` as token ids."""
        ids = self.sentences(index)
        return tokenise(self.corpus.rows(ids.start, ids.stop), self.tokenizer, self.max_length)

    def check(self) -> None:
        """ValueError, before anything is computed, for what this model cannot do."""
        how, params = self.how, self.how.model.params
        check_sites(how.sites, params.n_layers)
        context, bos = params.max_seq_len, int(how.bos_id is not None)
        if self.max_length + bos > context:
            raise ValueError(
                f"--max-length {self.max_length}: the model's context is {context} tokens; give at most {context - bos}"
            )
        if self.tokenizer.n_vocab > params.vocab_size:
            raise ValueError(
                f"--model {self.model_name}: its tokenizer has {self.tokenizer.n_vocab:,} tokens, its embedding "
                f"{params.vocab_size:,} rows; these do not belong together"
            )

    def provenance(self) -> dict[str, Any]:
        """All that decides the rows, to the last bit on one kind of device: what it takes to compute them again."""
        how = self.how
        return {
            "model": self.model_name,
            "model_hash": how.model.weights_hash,
            "tokenizer_hash": self.tokenizer.hash,
            "sites": list(how.sites),
            "d_model": how.model.params.dim,
            "widths": {site: how.model.width(site) for site in how.sites},
            "dtype": how.storage,
            "bos": "none" if how.bos_id is None else "feed",
            "max_length": self.max_length,
            "chunk_sentences": self.chunk_sentences,
            "batch_tokens": how.batch_tokens,
            "max_padding": how.max_padding,
            "corpus_hash": self.corpus.manifest_hash,
        }


class CapturedChunk(NamedTuple):
    """One chunk in memory, rows in order of sentence id."""

    tokens: ChunkTokens
    rows: dict[str, StoredRows]
    """(N, D) of each site."""
    norms: dict[str, Tensor]
    """(N,) float32 of each site."""
    counts: Counter[str]
    """slots and fed (tokens) of the forward passes; sentences truncated, empty, nonfinite."""


@dataclass
class StartedChunk:
    """A chunk whose forward passes are done, or on a GPU at least queued. `result` waits for its rows and looks at them."""

    how: ChunkCapture
    tokens: ChunkTokens
    rows: dict[str, StoredRows]
    norms: dict[str, Tensor]
    counts: Counter[str]
    wait: Callable[[], None]
    """Returns when `rows` and `norms` may be read."""

    @cached_property
    def result(self) -> CapturedChunk:
        """The chunk, checked. Raises NonFinite."""
        self.wait()
        captured = CapturedChunk(self.tokens, self.rows, self.norms, self.counts)
        bad = _nonfinite_sentences(captured)
        for sentence, what in bad.items():
            if not self.how.skip_nonfinite:
                raise NonFinite(f"{what}; --nonfinite skip leaves such sentences out and counts them")
            log.warning("sentence %d is left out: %s", int(self.tokens.sentence_ids[sentence]), what)
        return _without(captured, list(bad)) if bad else captured


def no_matter() -> None:
    """Nothing to do before a forward pass."""


@torch.inference_mode()
def start_chunk(
    how: ChunkCapture, chunk: ChunkTokens, before_batch: Callable[[], None] = no_matter, to_host: bool = True
) -> StartedChunk:
    """Run a chunk through the model. `before_batch` is called before each forward pass. With `to_host` its rows end up on the
    CPU, otherwise where the model is.
    """
    device = how.model.device
    N = len(chunk.token_ids)
    rows = {site: StoredRows.empty(N, how.model.width(site), how.storage, device) for site in how.sites}
    counts = Counter(fed=N, truncated=chunk.truncated, empty=int((chunk.lengths == 0).sum()))
    for batch in batches(chunk, how.batch_tokens, how.max_padding):
        before_batch()
        places = batch.rows.to(device)
        for site, x in _forward(how, batch).items():
            rows[site].put_(places, x)
        counts["slots"] += batch.tokens.numel()
    norms = {site: stored.norms() for site, stored in rows.items()}
    if device.type == "cpu":
        return StartedChunk(how, chunk, rows, norms, counts, wait=lambda: None)
    copies = _HostCopies(device)
    if to_host:
        rows = {site: stored.map(copies.start) for site, stored in rows.items()}
    norms = {site: copies.start(x) for site, x in norms.items()}
    return StartedChunk(how, chunk, rows, norms, counts, wait=copies.wait)


class _HostCopies:
    """Copies into pinned memory on a CUDA stream of their own, which run beside the next chunk's forward passes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start(self, x: Tensor) -> Tensor:
        """Where `x` will be once `wait` has returned."""
        # Pinned blocks come from PyTorch's caching allocator, so that from the second chunk on none is newly locked.
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
            self._done.record(self._stream)
        x.record_stream(self._stream)
        return host

    def wait(self) -> None:
        self._done.synchronize()


def _forward(how: ChunkCapture, batch: Batch) -> dict[str, Tensor]:
    """(real tokens of the batch, D) of each site.

    No mask is needed: padding stands on the right, where a causal model does not look from a real token. That keeps attention
    on its fast path.
    """
    tokens, slots = batch.tokens, batch.slots
    if how.bos_id is not None:
        B, T = tokens.shape
        slots = slots + slots.div(T, rounding_mode="floor") + 1  # in rows of T + 1, behind the BOS
        tokens = torch.cat((tokens.new_full((B, 1), how.bos_id), tokens), dim=1)
    tokens, slots = tokens.to(how.model.device), slots.to(how.model.device)
    captured = how.model.capture(tokens, sites=how.sites)
    return {site: x.flatten(0, 1).index_select(0, slots) for site, x in captured.items()}


def _nonfinite_sentences(captured: CapturedChunk) -> dict[int, str]:
    """Sentences, by place in the chunk, that hold NaN or Inf at any site, with a description of the first."""
    tokens = captured.tokens
    found: dict[int, str] = {}
    for site, norms in captured.norms.items():
        rows = (~norms.isfinite()).nonzero().squeeze(1)
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
        {site: rows.kept(kept) for site, rows in captured.rows.items()},
        {site: norms[kept] for site, norms in captured.norms.items()},
        captured.counts + Counter(nonfinite=len(sentences)),
    )


def encode(started: StartedChunk, site: str) -> tuple[Iterator[memoryview], int]:
    """The file of one site in pieces, and its rows. The counts of the chunk stand in its header: they outlive a kill together
    with the rows. Raises NonFinite.
    """
    captured = started.result
    tokens, norms = captured.tokens, captured.norms[site]
    abnormal = int((norms > ABNORMAL_RATIO * norms.median()).sum()) if len(norms) else 0
    tensors = captured.rows[site].tensors() | {
        "token_ids": tokens.token_ids.int(),
        "sentence_ids": tokens.sentence_ids,
        "document_ids": tokens.document_ids,
        "offsets": tokens.offsets,
    }
    counts = json.dumps(captured.counts | Counter(abnormal=abnormal), sort_keys=True)
    return tensorfile.pieces(tensors, {"counts": counts}), len(norms)


def read_counts(file: BinaryIO) -> Counter[str]:
    """The counts in the header of a file that `encode` made."""
    return Counter(json.loads(tensorfile.header(file)["__metadata__"]["counts"]))

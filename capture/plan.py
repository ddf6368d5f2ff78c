"""What a capture will take, before it starts: tokens, bytes and room on the disk from a sample, hours from a short probe."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from capture.batches import tokenise
from capture.chunks import ChunkCapture, start_chunk
from capture.storage import DTYPES
from capture.store import Corpus
from core.artifact import MANIFEST, Manifest
from llama3 import Tokenizer

SAMPLE_BLOCKS = 16  # runs of sentences, spread over the corpus, whose tokens are counted
SAMPLE_SENTENCES = 128  # of each
PROBE_S = 20.0
PROBE_SENTENCES = 32  # of the first step of the probe; each step takes twice as many as the one before


class Need(NamedTuple):
    """What the result takes. Estimates, exact where the corpus is no larger than the sample."""

    tokens: int
    bytes: int

    def part(self, of: int) -> "Need":
        """That of one of `of` parts."""
        return Need(self.tokens // of, self.bytes // of)


def need(corpus: Corpus, tokenizer: Tokenizer, how: ChunkCapture, max_length: int) -> Need:
    """Tokens of the corpus, and bytes of the activations folder."""
    n = corpus.n_sentences
    length = min(SAMPLE_SENTENCES, n)
    starts = sorted({block * (n - length) // (SAMPLE_BLOCKS - 1) for block in range(SAMPLE_BLOCKS)})
    if n <= SAMPLE_BLOCKS * SAMPLE_SENTENCES:
        starts, length = [0], n
    sample = sum(len(tokenise(corpus.rows(i, i + length), tokenizer, max_length).token_ids) for i in starts)
    tokens = round(sample * n / (length * len(starts)))
    values = sum(how.model.width(site) for site in how.sites) * DTYPES[how.storage].itemsize
    others = len(how.sites) * (4 * (how.storage == "int8") + 4)  # scale, token id
    # Three int64 per sentence and site: its id, document and offset.
    return Need(tokens, tokens * (values + others) + len(how.sites) * 24 * n)


def free(out: Path) -> int:
    """Bytes free where `out` is or will be."""
    while not out.exists():
        out = out.parent
    return shutil.disk_usage(out).free


def check_room(needed: Need, out: Path) -> None:
    """ValueError where what `out` does not hold yet cannot fit."""
    if (out / MANIFEST).is_file() and Manifest.read(out).complete:
        return
    there = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    if needed.bytes - there > free(out):
        raise ValueError(
            f"--out {out}: about {gigabytes(needed.bytes)} are needed for {needed.tokens:,} tokens, {gigabytes(there)} of them "
            f"are there, and {gigabytes(free(out))} are free; free some space, choose another --out, fewer --sites, or "
            "--storage int8"
        )


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3g} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.3g} MB"


def probe(corpus: Corpus, tokenizer: Tokenizer, how: ChunkCapture, max_length: int, chunk_sentences: int) -> float:
    """Tokens per second of this rank's forward passes, after a first one that does not count and some `PROBE_S` seconds of
    others; nothing is written."""

    def forward(n_sentences: int) -> int:
        tokens = tokenise(corpus.rows(0, n_sentences), tokenizer, max_length)
        start_chunk(how, tokens, before_batch=lambda: None).wait()
        if how.model.device.type == "cuda":
            torch.cuda.synchronize(how.model.device)
        return len(tokens.token_ids)

    size, rate = min(PROBE_SENTENCES, corpus.n_sentences, chunk_sentences), 0.0
    forward(size)  # the first pass reads weights from the disk and prepares kernels; it says nothing about the others
    began = time.monotonic()
    while True:
        step = time.monotonic()
        rate = forward(size) / (time.monotonic() - step)
        larger = min(2 * size, corpus.n_sentences, chunk_sentences)
        if time.monotonic() - began > PROBE_S / 2 or (larger == size and time.monotonic() - began > 1):
            return rate
        size = larger


def describe(needed: Need, n_free: int, rates: Sequence[float], n_sentences: int) -> str:
    """The plan, for people. `rates` are tokens per second of each rank."""
    total = sum(rates)
    hours = needed.tokens / max(total, 1e-9) / 3600
    written = gigabytes(round(total * needed.bytes / max(needed.tokens, 1)))
    return "\n".join(
        (
            f"sentences  {n_sentences:,}",
            f"tokens     {needed.tokens:,}",
            f"bytes      {gigabytes(needed.bytes)}",
            f"free       {gigabytes(n_free)}",
            f"speed      {total:,.0f} tokens/s on {len(rates)} process(es), {written}/s to the disk",
            f"time       {hours:,.2f} hours, if the disk keeps up",
        )
    )

"""What getting the rows from a model takes, and what the other way, batches on disk, would take.

Times are measured on this machine: forward passes for some seconds, and the disk of --out.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from capture import plan as capture_plan
from core.runtime import Runtime
from sae.memory import Memory
from sae.plan import Plan, existing, gib
from sae.streaming.feeder import Passes
from sae.streaming.sample import sample_chunks

DISK_PROBE = 2**27  # bytes written and flushed to see how fast the disk is
DISK_PASSES = 5
"""Times that all rows go to or from the disk before training: activations written and read, buckets
written and read, batches written. Each epoch reads them once more."""
ITEM_BYTES = {"bf16": 2, "fp32": 4}


class Needs:
    """Estimates for a corpus and a model."""

    def __init__(self, passes: Passes) -> None:
        self._passes, self.chunks = passes, passes.chunks

    @cached_property
    def _need(self) -> capture_plan.Need:
        chunks = self.chunks
        return capture_plan.need(chunks.corpus, chunks.tokenizer, chunks.how, chunks.max_length)

    @property
    def tokens(self) -> int:
        """Of the corpus."""
        return self._need.tokens

    @property
    def rows(self) -> int:
        """Of them, those that are learned from."""
        return round(self.tokens * (1 - self._passes.validation_fraction))

    def row_bytes(self, sites: Sequence[str]) -> int:
        """Of a token, at all `sites`."""
        how = self.chunks.how
        return sum(how.model.width(site) for site in sites) * ITEM_BYTES[how.storage]

    @property
    def model_bytes(self) -> int:
        """Weights and tables."""
        model = self.chunks.how.model
        return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    @property
    def chunk_rows(self) -> int:
        """Tokens of a chunk, on average."""
        chunks = self.chunks
        sentences = min(chunks.chunk_sentences, chunks.corpus.n_sentences)
        return max(1, self.tokens * sentences // chunks.corpus.n_sentences)

    @torch.inference_mode()
    def pass_bytes(self, sites: Sequence[str]) -> int:
        """At the peak of one forward pass, measured."""
        how, length = self.chunks.how, self.chunks.max_length
        shape = (max(1, how.batch_tokens // length), length)
        tokens = torch.zeros(shape, dtype=torch.long, device=how.model.device)
        if how.model.device.type == "cuda":
            before = torch.cuda.memory_allocated(how.model.device)
            torch.cuda.reset_peak_memory_stats(how.model.device)
            how.model.capture(tokens, sites=sites)
            return torch.cuda.max_memory_allocated(how.model.device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            how.model.capture(tokens, sites=sites)
        assert profiled.profiler is not None
        events = profiled.profiler.kineto_results.events()
        found = ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        now = most = 0
        for _, size in sorted(found):
            now += size
            most = max(most, now)
        return most

    def tokens_per_s(self, runtime: Runtime) -> float:
        """Of all ranks, after some seconds of forward passes."""
        chunks = self.chunks
        mine = capture_plan.probe(chunks.corpus, chunks.tokenizer, chunks.how, chunks.max_length, chunks.chunk_sentences)
        return float(sum(runtime.gather_objects(mine)))


def memory(plan: Memory, config: Any, runs: Sequence[Any], needs: Needs, runtime: Runtime) -> Memory:
    """Of one rank: `plan` is what its SAEs take."""
    sites = sorted({one.site for one in runs})
    row_bytes, share = needs.row_bytes(sites), runtime.world_size // config.latent_parallel
    window = min(config.buffer_rows, needs.rows * config.epochs)
    if config.max_steps:
        window = min(window, config.max_steps * config.batch_size)
    on_cpu = config.buffer_on == "host" and runtime.device.type == "cuda"
    buffer = 0 if on_cpu else window // share * row_bytes
    n_chunks = len(needs.chunks)
    sampled = min(sample_chunks(config, n_chunks) * needs.chunk_rows, config.buffer_rows)
    chunk = needs.chunk_rows * row_bytes
    # A chunk as computed and as it is handed out, and with several ranks those of all, twice.
    passing = chunk * (2 + 2 * runtime.world_size * (runtime.world_size > 1))
    peak = max(sampled * row_bytes, chunk + plan.step, passing + needs.pass_bytes(sites))
    return Memory(plan.held + buffer + needs.model_bytes, peak)


def with_rows(plan: Plan, config: Any, runs: Sequence[Any], needs: Needs, runtime: Runtime) -> Plan:
    """`plan`, which is that of the training alone, with what the rows take, and the other way."""
    sites = sorted({one.site for one in runs})
    whole = memory(plan.memory, config, runs, needs, runtime)
    rate = needs.tokens_per_s(runtime)
    passes = needs.tokens * config.epochs / rate
    on_disk = needs.tokens * needs.row_bytes(sites)
    speed = disk_bytes_per_s(existing(config.out))
    beside = max if runtime.device.type == "cuda" else lambda *parts: sum(parts)
    here = float(beside(passes, plan.seconds))
    there = needs.tokens / rate + on_disk * (DISK_PASSES + config.epochs) / speed + plan.seconds
    room = plan.disk + 2 * on_disk <= plan.disk_free
    cheaper = "this way" if here <= there or not room else "capture and batches"
    advice = plan.advice
    if not advice and sum(whole) > plan.memory_free:
        advice = f"memory does not fit: lower --buffer-rows {config.buffer_rows}"
    notes = (
        *plan.notes,
        f"rows    {needs.rows:,} an epoch; the buffer holds {config.buffer_rows:,}",
        f"passes  {passes / 3600:,.2f} h at {rate:,.0f} tokens/s through the model",
        f"or      {gib(on_disk)} of activations and as much of batches, {gib(plan.disk_free)} free; "
        f"{there / 3600:,.2f} h with them at {speed / 2**20:,.0f} MiB/s, {here / 3600:,.2f} h this way",
        f"cheaper {cheaper}" + ("" if room else ": batches do not fit on this disk"),
    )
    return replace(plan, memory=whole, seconds=here, notes=notes, advice=advice)


def disk_bytes_per_s(folder: Path) -> float:
    """Written to a file in `folder`, which is removed again, and flushed."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.monotonic()
        for _ in range(DISK_PROBE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return DISK_PROBE / (time.monotonic() - began)

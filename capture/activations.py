"""Sentences -> activations: run a Llama over a corpus and write what passes through the sites asked for.

torchrun --nproc_per_node=8 -m capture.activations --model M --corpus corpus/ --sites layers.23.resid_post --out acts/
python -m capture.activations --model demo --corpus corpus/ --out acts/

The corpus is cut into chunks of consecutive sentences. A chunk goes to the rank that asks next, and batches form inside a chunk
only, so that any number of processes writes the same bytes. A chunk is also what is resumed after a kill.
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from capture import plan
from capture.ahead import ahead
from capture.batches import ChunkTokens
from capture.chunks import ChunkCapture, CorpusChunks, encode, read_counts, start_chunk
from capture.remote import RemoteBuilder
from capture.storage import Storage
from capture.store import Corpus, chunk_name, open_corpus, site_of
from capture.writer import FileToWrite, Writer
from core.artifact import Builder, building
from core.cli import Progress, StageConfig, machine, run_stage
from core.runtime import Runtime
from core.terminal import say
from llama3 import Tokenizer, Transformer, load_model, load_tokenizer
from llama3.hub import model_name
from llama3.sites import as_sites, default_site
from llama3.tokenizer import Bos

log = logging.getLogger("capture.activations")


@dataclass(frozen=True, kw_only=True)
class ActivationsConfig(StageConfig):
    """Flags of the stage."""

    model: str
    """A model: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo. The manifest holds its last part and the hash of
    its weights."""
    corpus: Path
    """A corpus folder, from capture.sentences."""
    out: Path
    """The activations folder to write."""
    sites: tuple[str, ...] = ()
    """Sites to capture in one pass, each into a folder of its own. Empty: resid_post at 5/6 of the depth. There are
    embed, final_norm, and layers.{i}. followed by resid_pre, attn_norm, attn_heads, attn_out, resid_mid, ffn_norm, ffn_hidden,
    ffn_out or resid_post."""
    storage: Storage = "bf16"
    """Type of the stored activations. int8, with one scale per row, takes half the bytes of bf16; SAEs of the embedded model
    trained on either had the same FVU, 0.404. Its error is 1e-4 of the variance, that of bf16 3e-6."""
    bos: Bos = "auto"
    """feed: put the BOS token before each sentence, and do not store its row. none: do not. auto: as the model was trained; the
    manifest records which of the two that is."""
    max_length: int = 192
    """Tokens after which a sentence is cut; cut sentences are counted."""
    chunk_sentences: int = 2048
    """Sentences of a chunk: the unit of writing, resuming and handing out."""
    batch_tokens: int = 8192
    """Slots of one forward pass, padding included. Part of the result: the last bits differ with the shape of a batch."""
    max_padding: float = 0.05
    """A batch ends early rather than hold a greater share of padding. 0: only sentences of one length meet."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """On NaN or Inf: stop, or give the sentence no rows (at any site) and count it."""
    queue_depth: int = machine(2)
    """Files that may wait to be written, each held in memory."""
    part: str = machine("")
    """I/N: capture only each N-th chunk from the I-th on, for a machine whose disk the others do not see; capture.merge joins
    the folders of all N."""
    remote: str = machine("")
    """s3://BUCKET/FOLDER and the like: the files go there, --out keeps what is needed to continue. capture.remote fetches."""
    plan: bool = machine(False)
    """Write nothing; print tokens, bytes, free space and, from a probe of some 20 s, hours. Code 2 if it cannot fit."""
    finish: bool = machine(False)
    """Run nothing more and close the folder that was begun, as if the corpus ended where the first chunk is missing. Chunks
    after that one are removed, and the folder cannot be continued."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", as_sites(self.sites))
        for name in ("max_length", "chunk_sentences", "batch_tokens", "queue_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if not 0 <= self.max_padding < 1:
            raise ValueError(f"--max-padding {self.max_padding}: expected a share from 0 to less than 1")
        if len(set(self.sites)) < len(self.sites):
            raise ValueError(f"--sites {' '.join(self.sites)}: a site is named twice")
        part, of = self.part_of
        if not 1 <= part <= of:
            raise ValueError(f"--part {self.part}: expected I/N with I from 1 to N, such as 1/3")
        if self.finish and self.part:
            raise ValueError(
                f"--finish --part {self.part}: capture.merge needs the whole of each part; leave out one of the two"
            )
        if self.finish and self.plan:
            raise ValueError("--finish --plan: --finish runs nothing that could be planned; leave out one of the two")

    @property
    def part_of(self) -> tuple[int, int]:
        """Which part of how many; (1, 1) is everything, (0, 0) what cannot be read."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.part or "1/1")
        return (int(found[1]), int(found[2])) if found else (0, 0)


def run(config: ActivationsConfig, runtime: Runtime) -> None:
    """Write the activations folder together with the other ranks."""
    corpus = open_corpus(config.corpus)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, runtime.device)
    config = replace(
        config,
        sites=config.sites or (default_site(model.params.n_layers),),
        bos=tokenizer.bos_policy if config.bos == "auto" else config.bos,
    )
    chunks = _chunks(config, model, tokenizer, corpus)
    chunks.check()
    how = chunks.how
    needed = runtime.on_main(lambda: plan.need(corpus, tokenizer, how, config.max_length)).part(config.part_of[1])
    if config.plan:
        rates = runtime.gather_objects(plan.probe(corpus, tokenizer, how, config.max_length, config.chunk_sentences))
        runtime.on_main(lambda: say(plan.describe(needed, plan.free(config.out), rates, corpus.n_sentences)))
    if not config.remote and not config.finish:
        runtime.on_main(lambda: plan.check_room(needed, config.out))
    if config.plan:
        return
    provenance = chunks.provenance() | ({"part": config.part} if config.part else {})
    recorded = replace(config, model=provenance["model"])
    with building(
        config.out, "activations-part" if config.part else "activations", recorded, runtime,
        inputs=[corpus.artifact], provenance=provenance, builder=RemoteBuilder.at(config.remote) if config.remote else Builder,
    ) as builder:  # fmt: skip
        if builder.complete:
            log.info("%s: already complete%s", config.out, _closed_early(builder.counts["sentences"], corpus))
            return
        stage = _Stage(config, runtime, chunks)
        names, n_sentences = stage.close(builder) if config.finish else (stage.write(builder), corpus.n_sentences)
        counts = total_counts(config.sites, names, builder, runtime)
        builder.finish(names, {"sentences": n_sentences} | counts)
    log.info(
        "%s: %s tokens of %s sentences%s at %s; padding %.1f%%; truncated %d, empty %d, non-finite %d; abnormal norms %s",
        config.out, f"{counts['tokens']:,}", f"{n_sentences:,}", _closed_early(n_sentences, corpus),
        ", ".join(config.sites), 100 * counts["padding_share"],
        counts["truncated_sentences"], counts["empty_sentences"], counts["nonfinite_sentences"],
        ", ".join(f"{share:.2%}" for share in counts["abnormal_norm_share"].values()),
    )  # fmt: skip


def _closed_early(n_sentences: int, corpus: Corpus) -> str:
    without = corpus.n_sentences - n_sentences
    return f" (closed with --finish before the other {without:,})" if without else ""


def _chunks(config: ActivationsConfig, model: Transformer, tokenizer: Tokenizer, corpus: Corpus) -> CorpusChunks:
    how = ChunkCapture(
        model=model,
        sites=config.sites,
        storage=config.storage,
        batch_tokens=config.batch_tokens,
        max_padding=config.max_padding,
        bos_id=tokenizer.bos_id if config.bos == "feed" else None,
        skip_nonfinite=config.nonfinite == "skip",
    )
    return CorpusChunks(
        corpus=corpus,
        tokenizer=tokenizer,
        how=how,
        model_name=model_name(config.model),
        max_length=config.max_length,
        chunk_sentences=config.chunk_sentences,
    )


@dataclass(frozen=True)
class _Stage:
    """What one rank needs to turn chunks of the corpus into files."""

    config: ActivationsConfig
    runtime: Runtime
    chunks: CorpusChunks

    def write(self, builder: Builder) -> list[str]:
        """Capture and publish the chunks that no earlier run has finished, whichever this rank comes to take.

        Returns the names of the files that this rank answers for: those it wrote, and on rank 0 those that were there.
        """
        missing, there = self.runtime.on_main(lambda: self._survey(builder))
        todo = list(missing)
        total = sum(len(self.chunks.sentences(index)) for index in todo)
        mine = there if self.runtime.is_main else []
        with (
            Progress("capture.activations", total, "sentences", self.runtime) as bar,
            Writer(builder, self.config.timeout_s, self.config.queue_depth) as writer,
        ):
            began, seen, counts = time.monotonic(), 0, Counter[str]()
            for n_mine, (place, tokens) in enumerate(ahead(self._tokenised(todo)), 1):
                started = start_chunk(self.chunks.how, tokens, writer.check)
                for site in missing[todo[place]]:
                    name = chunk_name(site, todo[place])
                    writer.put(FileToWrite(name, partial(encode, started, site)))
                    mine.append(name)
                counts += started.counts
                # Places are handed out in order, so this rank's last one tells how far all ranks together have come.
                everybody = (place + 1) / n_mine
                notes = _notes(counts, writer, (time.monotonic() - began) / everybody)
                bar.update((place + 1 - seen) * total // len(todo), **notes)
                seen = place + 1
        return mine

    def close(self, builder: Builder) -> tuple[list[str], int]:
        """Keep the chunks that earlier runs finished without a gap, and nothing else: the names of the files that this rank
        answers for, and the number of sentences. ValueError where not even the first chunk is there.
        """

        def keep() -> tuple[list[str], int]:
            missing, there = self._survey(builder)
            n_chunks = min(missing, default=len(self.chunks))
            if not n_chunks:
                raise ValueError(
                    f"--finish: {self.config.out} holds no whole chunk of {self.config.chunk_sentences:,} sentences that could "
                    "be closed; leave out --finish, and the same command goes on"
                )
            kept = {chunk_name(site, index) for site in self.chunks.how.sites for index in range(n_chunks)}
            builder.keep_only(kept)
            n_sentences = min(n_chunks * self.config.chunk_sentences, self.chunks.corpus.n_sentences)
            return [name for name in there if name in kept], n_sentences

        names, n_sentences = self.runtime.on_main(keep)
        return (names if self.runtime.is_main else []), n_sentences

    def _survey(self, builder: Builder) -> tuple[dict[int, list[str]], list[str]]:
        """The sites still to be written of each chunk that lacks some, and the files that are there."""
        missing: dict[int, list[str]] = {}
        there = []
        part, of = self.config.part_of
        for index in range(part - 1, len(self.chunks), of):
            for site in self.chunks.how.sites:
                if builder.has(chunk_name(site, index)):
                    there.append(chunk_name(site, index))
                else:
                    missing.setdefault(index, []).append(site)
        if there:
            log.info("%d of %d files are there already", len(there), len(there) + sum(map(len, missing.values())))
        return missing, there

    def _tokenised(self, todo: Sequence[int]) -> Iterator[tuple[int, ChunkTokens]]:
        """The chunks of `todo` that fall to this rank: place in `todo`, and tokens."""
        for place in self.runtime.hand_out(len(todo)):
            yield place, self.chunks.tokens(todo[place])


def _notes(counts: Counter[str], writer: Writer, seconds: float) -> dict[str, str | int]:
    """What progress shows beside the sentences of all ranks: rates of all, taken to be as this rank's over its share of the
    `seconds`; padding and queue of this rank."""
    return {
        "tokens/s": f"{counts['fed'] / seconds:,.0f}",
        "MB/s": f"{writer.bytes / seconds / 1e6:.1f}",
        "padding": f"{_padding(counts):.1%}",
        "queue": writer.waiting,
    }


def _padding(counts: Mapping[str, int]) -> float:
    return 1 - counts["fed"] / counts["slots"] if counts["slots"] else 0.0


def total_counts(sites: Sequence[str], names: Sequence[str], builder: Builder, runtime: Runtime) -> dict[str, Any]:
    """The manifest's counts of all ranks' files `names` together. They are read back from the files, so that those of an
    earlier run are among them.
    """
    mine: dict[str, Counter[str]] = {site: Counter() for site in sites}
    for name in names:
        record = builder.has(name)
        assert record is not None
        with builder.open(name) as file:
            mine[site_of(name)] += read_counts(file) + Counter(tokens=record.rows)
    every: list[Mapping[str, Counter[str]]] = runtime.gather_objects(mine)
    total = {site: sum((part[site] for part in every), Counter()) for site in sites}
    one = total[sites[0]]  # sites differ in their norms alone
    return {
        "tokens": one["tokens"],
        "truncated_sentences": one["truncated"],
        "empty_sentences": one["empty"],
        "nonfinite_sentences": one["nonfinite"],
        "padding_share": round(_padding(one), 6),
        "abnormal_norm_rows": {site: count["abnormal"] for site, count in total.items()},
        "abnormal_norm_share": {site: round(n["abnormal"] / max(n["tokens"], 1), 6) for site, n in total.items()},
    }


if __name__ == "__main__":
    run_stage(ActivationsConfig, run, __doc__ or "")

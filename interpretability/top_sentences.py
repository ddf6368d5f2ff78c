"""The sentences in which each latent is largest, a sample of each level of its activation, its statistics, the latents that
fire
with it and the tokens it promotes: one pass over stored activations, or straight from the model.

    python -m interpretability.top_sentences --sae run/sae --activations acts/ --model demo --corpus corpus/ --out top/
    python -m interpretability.top_sentences --sae run/sae --model demo --corpus corpus/ --out top/
    python -m interpretability.top_sentences --sae run/sae --model M --corpus ours/ --statistics all/top --out top/
    torchrun --nproc_per_node=8 -m interpretability.top_sentences --sae run/sae --activations acts/ --model M --corpus ...

Every latent gets its own list, for each aggregation, however rarely it fires. Without BOS the first token of a text is the
attention sink, so it is not read. Chunks are dealt to the ranks; the result does not depend on how many there are.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tyro.conf import arg

from capture.store import Activations, Chunk, Corpus, open_activations, open_corpus
from core.artifact import Builder, building, check_provenance, open_artifact
from core.cli import Progress, StageConfig, machine, run_stage
from core.norms import row_norms
from core.runtime import Runtime
from interpretability.evidence.background import Background, Sampler, cofiring
from interpretability.evidence.firing import firing
from interpretability.evidence.live import LiveActivations
from interpretability.evidence.ngrams import NgramCounter, ngrams_of_rows
from interpretability.evidence.peaks import varieties
from interpretability.evidence.promoted import PromotedTokens, promoted_by, reaches_output
from interpretability.evidence.raised import contexts_of, ends_the_model, raised_tokens, response_at
from interpretability.evidence.selection import Hits, LatentTotals, Ragged, Sentences, TopTable, pairs_of
from interpretability.evidence.tables import Once, TextLookup, background_rows, rows_of, statistics_of
from interpretability.opening import open_top_of
from interpretability.records import (
    AGGREGATIONS,
    BACKGROUND_FILE,
    BACKGROUND_SCHEMA,
    COMPACT_SCHEMA,
    LATENTS_FILE,
    MEASURED_LATENT_SCHEMA,
    SHARED_FILE,
    SHARED_SCHEMA,
    TOP_FILE,
    TOP_SCHEMA,
    TopSentences,
    parquet_bytes,
)
from llama3 import Tokenizer, load_model, load_tokenizer
from sae.model import SAE, load

BATCH_TOKENS = 1 << 13
"""Tokens worked on at a time, about: what is made of them stays in a processor's cache, and memory goes with no chunk."""

log = logging.getLogger("interpretability.top_sentences")


@dataclass(frozen=True, kw_only=True)
class TopSentencesConfig(StageConfig):
    """Flags of `python -m interpretability.top_sentences`."""

    sae: Path
    """Folder of the SAE (`run/sae`)."""
    activations: Path | None = None
    """Folder of stored activations, of the site that the SAE was trained on. None: the model computes them, and none are
    stored."""
    model: str = machine()
    """The model that the activations come from: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo.
    Gives tokens and promoted tokens."""
    corpus: Path
    """Folder of the corpus that the activations come from. Gives texts and names of documents."""
    statistics: Path | None = None
    """Folder of top sentences of the same SAE on other text, such as all that it was trained on: maximum, density, counts and
    histogram of a latent are taken from there, sentences from --corpus. None: all from --corpus."""
    out: Path
    """Folder to write."""
    site: str = ""
    """Site to read. Empty: the one that the SAE was trained on."""
    n: Annotated[int, arg(name="n-sentences", aliases=("--n",))] = 50
    """Sentences kept for each latent and aggregation. (torchrun takes --n for its own; --n-sentences reaches us.)"""
    aggregations: tuple[str, ...] = AGGREGATIONS
    """How a sentence's activations become one value: max, mean (over all its tokens), last (token)."""
    n_promoted: int = 10
    """Promoted and suppressed tokens kept for each latent; 0 for none."""
    contexts: int = 64
    """Beginnings of sentences in which latents are turned up to see which tokens rise: one pass over a token for each of them
    and each coordinate of the site, whatever the number of latents. 0: by the decoder row and the unembedding alone, which
    says little below the last layers."""
    n_level: int = 2
    """Sentences drawn from each level of a latent's activation (bins that double, as in its histogram); 0 for none."""
    sample_sentences: int = 1000
    """Sentences drawn from the corpus, about: what n-grams and scores compare with, and where co-firing is counted; 0 for
    none."""
    n_ngrams: int = 5
    """Over-represented n-grams kept for each latent; 0 for none."""
    n_cofiring: int = 8
    """Latents kept for each latent as firing on the same tokens; 0 for none."""
    compact: bool = False
    """Store each sentence once instead of with every latent: a tenth of the bytes where latents share sentences, as in small
    corpora. Whoever opens the folder reads all of them into memory."""

    def __post_init__(self) -> None:
        names = tuple(name for item in self.aggregations for name in item.split(",") if name)
        object.__setattr__(self, "aggregations", names)
        unknown = [name for name in names if name not in AGGREGATIONS]
        if unknown or not names or len(set(names)) < len(names):
            raise ValueError(f"--aggregations {','.join(names)!r}: expected some of {', '.join(AGGREGATIONS)}, each once")
        if self.n < 1:
            raise ValueError(f"--n-sentences must be at least 1; found {self.n}")
        for name in ("n_promoted", "contexts", "n_level", "sample_sentences", "n_ngrams", "n_cofiring"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0; found {getattr(self, name)}")


def run(config: TopSentencesConfig, runtime: Runtime) -> None:
    """Write the folder `config.out` of kind `top_sentences`."""
    sae = load(config.sae)
    corpus = open_corpus(config.corpus)
    tokenizer = load_tokenizer(config.model)
    activations = _open(config, runtime, sae, corpus, tokenizer)
    _check_inputs(sae, activations, corpus, tokenizer)
    other = open_top_of(sae, config.statistics) if config.statistics else None
    provenance = activations.provenance | {"sae_hash": sae.weights_hash, "n_latents": sae.cfg.n_latents}
    provenance |= _origin_of_statistics(other) if other else {}
    stored = [activations.artifact] if isinstance(activations, Activations) else []
    inputs = [open_artifact(config.sae, "sae"), *stored, corpus.artifact, *([other.artifact] if other else [])]
    with building(config.out, "top_sentences", config, runtime, inputs, provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        promoted = _promoted(config, runtime, sae, corpus)
        found = _pass(config, runtime, sae.to(runtime.device), activations)
        counted = other.counted if other else None
        names = _write(config, builder, runtime, found, Extras(promoted, TextLookup(corpus, tokenizer), counted))
        counts = {
            "latents": sae.cfg.n_latents,
            "dead_latents": int((found.totals.firing == 0).sum()),
            "tokens": int(found.totals.tokens),
            "left_out_tokens": found.left_out,
            "sentences": activations.n_sentences,
        }
        builder.finish(names, counts | (_counts_of_statistics(other, counts, found.totals) if other else {}))
    log.info(
        "%s: top %d sentences of %s latents by %s, from %s tokens in %s sentences; %s latents fired on none of them, %s tokens "
        "left out",
        config.out, config.n, f"{sae.cfg.n_latents:,}", ", ".join(config.aggregations), f"{counts['tokens']:,}",
        f"{activations.n_sentences:,}", f"{counts['dead_latents']:,}", f"{counts['left_out_tokens']:,}",
    )  # fmt: skip


def _origin_of_statistics(other: TopSentences) -> dict[str, str]:
    """What the provenance says of the folder that --statistics names, and of the text that was counted there."""
    counted_on = other.provenance.get("statistics_corpus_hash", other.provenance["corpus_hash"])
    return {"statistics_hash": other.artifact.manifest.hash, "statistics_corpus_hash": counted_on}


def _counts_of_statistics(other: TopSentences, shown: Mapping[str, int], totals: LatentTotals) -> dict[str, int]:
    """Counts of the text of --statistics in their usual places, and beside them those of the `shown` sentences."""
    counted = {name: other.artifact.manifest.counts[name] for name in ("dead_latents", "tokens", "sentences")}
    unseen = int(((totals.sentences.cpu() == 0) & torch.from_numpy(other.firing_counts > 0)).sum())
    beside = {"shown_tokens": shown["tokens"], "shown_sentences": shown["sentences"], "latents_not_shown": unseen}
    return counted | beside


def _open(
    config: TopSentencesConfig, runtime: Runtime, sae: SAE, corpus: Corpus, tokenizer: Tokenizer
) -> Activations | LiveActivations:
    site = config.site or sae.site
    if config.activations:
        return open_activations(config.activations, site)
    return LiveActivations(config.model, tokenizer, corpus, sae, site, runtime)


def _promoted(config: TopSentencesConfig, runtime: Runtime, sae: SAE, corpus: Corpus) -> PromotedTokens:
    """The tokens that each latent promotes and suppresses: by intervention, or by its decoder row alone where --contexts is 0
    or nothing comes after the site. Empty lists where none are asked for.

    ValueError where the model is not the one that the SAE was trained on.
    """
    n, nothing = config.n_promoted, PromotedTokens([[]] * sae.cfg.n_latents, [[]] * sae.cfg.n_latents)
    if n == 0:
        return nothing
    model, tokenizer = load_model(config.model, runtime.device).eval(), load_tokenizer(config.model)
    check_provenance("the model of --model", sae.cfg.provenance, {"model_hash": model.weights_hash}, ("model_hash",))
    contexts = contexts_of(corpus, tokenizer, config.contexts, config.seed)
    if contexts and not ends_the_model(sae.site, model.params.n_layers):
        return raised_tokens(model, response_at(model, sae.site, contexts, runtime), sae.W_dec, tokenizer, n, runtime)
    return promoted_by(model, sae.site, sae.W_dec.to(model.device), tokenizer, n) if reaches_output(sae.site) else nothing


def _check_inputs(sae: SAE, activations: Activations | LiveActivations, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """ValueError naming both values where SAE, activations, corpus and tokenizer do not belong together."""
    where = f"activations {activations.artifact.path}" if isinstance(activations, Activations) else "the model of --model"
    wanted, found = sae.cfg.provenance | {"d_model": sae.cfg.d_model}, activations.provenance
    kept = ("dtype",) if wanted.get("dtype") else ()  # SAEs from elsewhere do not say in what their rows were stored
    check_provenance(where, wanted, found, ("model_hash", "tokenizer_hash", "site", "bos", "d_model", *kept))
    check_provenance(f"corpus {corpus.artifact.path}", found, {"corpus_hash": corpus.manifest_hash}, ("corpus_hash",))
    check_provenance("the tokenizer of --model", found, {"tokenizer_hash": tokenizer.hash}, ("tokenizer_hash",))


class Extras(NamedTuple):
    """What is written beside that which the pass finds."""

    promoted: PromotedTokens
    lookup: TextLookup
    counted: pa.Table | None
    """Statistics of another text."""


class _Found(NamedTuple):
    """What the pass over the tokens gives."""

    table: TopTable
    """Of this rank's chunks."""
    totals: LatentTotals
    """Of all ranks, as all that follows."""
    background: Background | None
    left_out: int
    """Tokens whose norm is beyond what the SAE was trained on, and the first of each sentence where no BOS stands before it."""


def _pass(config: TopSentencesConfig, runtime: Runtime, sae: SAE, activations: Activations | LiveActivations) -> _Found:
    n_latents, device = sae.cfg.n_latents, runtime.device
    table = TopTable(n_latents, config.n, config.aggregations, device, config.n_level, config.seed)
    totals = LatentTotals(n_latents, device)
    sampler = Sampler(config.sample_sentences, activations.n_sentences, config.seed)
    left_out = torch.zeros((), dtype=torch.int64, device=device)
    # Without BOS the first token is the attention sink; training left out rows of such norm, so what fires there means nothing.
    max_norm = sae.cfg.provenance.get("max_norm") or math.inf
    has_sink = activations.provenance.get("bos") != "feed"
    with Progress("top sentences", activations.n_sentences, "sentences", runtime) as bar:
        for index in runtime.share(len(activations)):
            for part in parts_of(activations.chunk(index)):
                keep = usable_tokens(part, max_norm, has_sink)
                sentences = Sentences(part.sentence_ids, part.document_ids, Ragged(part.token_ids.int(), part.offsets))
                hits = encode_chunk(sae, part, keep, device)
                pairs = pairs_of(hits, sentences.to(device), config.aggregations)
                totals.add(hits, pairs, int(keep.sum()))
                table.add(pairs, sentences)
                sampler.add(hits, sentences)
                left_out += int((~keep).sum())
                bar.update(runtime.world_size * len(part.sentence_ids))  # all ranks are about as far
    table.merge()
    totals.combine(runtime)
    return _Found(table, totals, sampler.gathered(runtime), int(runtime.comm.sum_(left_out)))


def _write(
    config: TopSentencesConfig,
    builder: Builder,
    runtime: Runtime,
    found: _Found,
    extras: Extras,
) -> list[str]:
    """Write the files, on rank 0; returns their names there."""
    promoted, lookup, counted = extras
    n_latents = len(found.totals.firing)
    tables = rows_of(found.table, n_latents, runtime, lookup)
    if not runtime.is_main:
        for _ in tables:  # answers rank 0, which asks every rank for its part of each block
            pass
        return []
    background = background_rows(found.background, lookup) if found.background else BACKGROUND_SCHEMA.empty_table()
    ngrams: list[list[dict[str, Any]]] = [[] for _ in range(n_latents)]
    counter = NgramCounter(background["text"].to_pylist()) if config.n_ngrams and found.background else None

    peak_variety = np.zeros(n_latents, np.float32)
    once = Once() if config.compact else None

    def rows() -> Iterator[pa.Table]:
        for table in tables:
            for latent, share in varieties(table, config.aggregations[0]):
                peak_variety[latent] = share
            if counter:
                for latent, strongest in ngrams_of_rows(table, config.aggregations[0], counter, config.n_ngrams):
                    ngrams[latent] = strongest
            yield once.taken_from(table) if once else table

    builder.publish(TOP_FILE, parquet_bytes(COMPACT_SCHEMA if once else TOP_SCHEMA, rows()))
    if once:
        builder.publish(SHARED_FILE, parquet_bytes(SHARED_SCHEMA, [once.table()]))
    builder.publish(BACKGROUND_FILE, parquet_bytes(BACKGROUND_SCHEMA, [background]))
    together = cofiring(found.background, n_latents, config.n_cofiring) if found.background else [[]] * n_latents
    statistics = statistics_of(found.totals, promoted, ngrams, together, peak_variety, counted)
    builder.publish(LATENTS_FILE, parquet_bytes(MEASURED_LATENT_SCHEMA, [statistics]))
    return [TOP_FILE, BACKGROUND_FILE, LATENTS_FILE, *([SHARED_FILE] if once else [])]


def usable_tokens(chunk: Chunk, max_norm: float, has_sink: bool) -> Tensor:
    """(n_tokens,) bool: whether the norm of the activation is at most `max_norm`, and with `has_sink` the token not the first
    of its sentence.

    Raises ValueError naming the first sentence with an activation that is not finite: top-k would rank NaN first.
    """
    norms = row_norms(chunk.activations)
    if len(bad := (~norms.isfinite()).nonzero()):
        row = int(torch.searchsorted(chunk.offsets, bad[0, 0], right=True)) - 1
        raise ValueError(
            f"activations: NaN or infinity in sentence {int(chunk.sentence_ids[row])} "
            f"(chunk {chunk.index}, token {int(bad[0, 0] - chunk.offsets[row])} of the sentence); capture them again"
        )
    usable: Tensor = norms <= max_norm
    if has_sink:
        usable[chunk.offsets[:-1][chunk.offsets.diff() > 0]] = False
    return usable


def parts_of(chunk: Chunk) -> Iterator[Chunk]:
    """The sentences of a chunk in parts of about BATCH_TOKENS tokens, none of them copied."""
    batch = chunk.offsets[:-1].div(BATCH_TOKENS, rounding_mode="floor")
    cuts = [0, *(batch.diff().nonzero().squeeze(1) + 1).tolist(), len(chunk.sentence_ids)]
    for first, last in pairwise(cuts):
        begin, end = chunk.offsets[[first, last]].tolist()
        yield Chunk(
            chunk.index,
            chunk.activations[begin:end],
            chunk.token_ids[begin:end],
            chunk.sentence_ids[first:last],
            chunk.document_ids[first:last],
            chunk.offsets[first : last + 1] - begin,
        )


def encode_chunk(sae: SAE, chunk: Chunk, keep: Tensor, device: torch.device) -> Hits:
    """Activations above zero of the tokens where `keep` is True, on `device`, in order of token."""
    tokens = keep.nonzero().squeeze(1)
    rows = torch.searchsorted(chunk.offsets, tokens, right=True) - 1
    positions = tokens - chunk.offsets[rows]
    token, latents, values = firing(sae, chunk.activations[tokens].to(device))
    return Hits(latents, values, positions.to(device)[token], rows.to(device)[token])


if __name__ == "__main__":
    run_stage(TopSentencesConfig, run, __doc__ or "")

"""How good an SAE is: reconstruction on held-out sentences, and what the model loses when it must live with it.

    python -m sae.evaluate --sae run/sae --model M --corpus corpus/ --out evaluation/
    torchrun --nproc_per_node=8 -m sae.evaluate ... --sentences 20000

The model reads sentences of held-out documents; at the SAE's site, x is replaced by its reconstruction, by zero or by the mean.
Every figure in evaluation.json stands with its definition and the conditions that it holds under.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capture.store import Corpus, open_corpus
from core.artifact import building, check_provenance, open_artifact
from core.cli import Progress, StageConfig, run_stage
from core.norms import row_norms
from core.runtime import Runtime
from llama3 import Tokenizer, Transformer, load_model, load_tokenizer
from sae.accumulator import SPLICES, Accumulator, Covariance
from sae.evaluation import Baselines, baselines, figures, markdown, plot_densities
from sae.model import SAE, load
from sae.split import held_out

log = logging.getLogger("sae.evaluate")

CHUNK_SENTENCES = 128  # batches form inside a chunk only
LANES = 8  # chunk i belongs to lane i mod 8 and lanes are merged in order: up to 8 ranks, the same sums


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """Flags of the stage."""

    sae: Path
    """Folder of an SAE: run/sae."""
    model: str
    """The model that its activations came from: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo."""
    corpus: Path
    """Corpus folder; where it is the one that the SAE was trained on, only held-out documents are used."""
    out: Path
    """Folder to write."""
    sentences: int = 1000
    """Sentences evaluated, drawn at random, and as many others for the mean and PCA; 0: all."""
    batch_tokens: int = 4096
    """Token slots of a forward pass, padding included. Part of the result: the last bits differ with the shape of a batch."""
    other_weights: bool = False
    """Accept a model whose weights are not those that the SAE was trained on, such as the unquantised copy of a quantised
    model: the evaluation then says what the SAE is worth there."""

    def __post_init__(self) -> None:
        if self.sentences < 0 or self.batch_tokens < 1:
            raise ValueError(
                f"--sentences must not be negative and --batch-tokens at least 1; found {self.sentences}, {self.batch_tokens}"
            )


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the SAE, its model, and how sentences are read."""

    sae: SAE
    model: Transformer
    tokenizer: Tokenizer
    batch_tokens: int

    @property
    def bos(self) -> list[int]:
        """The tokens put before each sentence, at which nothing is counted or replaced."""
        return [self.tokenizer.bos_id] if self.sae.cfg.provenance.get("bos") == "feed" else []

    @property
    def max_norm(self) -> float:
        """Tokens of larger norm are no rows of the training either; they stay as they are."""
        return self.sae.cfg.provenance.get("max_norm") or math.inf

    def kept(self, x: Tensor, real: Tensor) -> Tensor:
        """Tokens of `x` (B, T, D) that count, bool (B, T): real, no BOS, of normal norm. `real` (B, T) is False at padding."""
        kept = real & (row_norms(x) <= self.max_norm)
        kept[:, : len(self.bos)] = False
        return kept


class Sample(NamedTuple):
    """Sentence ids: those evaluated, those that the mean and PCA come from, and how the first were chosen."""

    evaluated: Tensor
    fitted: Tensor
    split: str


def run(config: EvaluateConfig, runtime: Runtime) -> None:
    """Write the evaluation folder."""
    sae_artifact, corpus = open_artifact(config.sae, "sae"), open_corpus(config.corpus)
    subject = open_subject(config, runtime.device)
    provenance = {name: subject.sae.cfg.provenance.get(name) for name in ("model", "model_hash", "tokenizer_hash", "site")}
    provenance |= {"sae_hash": subject.sae.weights_hash, "corpus_hash": corpus.manifest_hash}
    provenance["model_hash"] = subject.model.weights_hash
    recorded = replace(config, model=str(provenance["model"]))
    inputs = [sae_artifact, corpus.artifact]
    with building(config.out, "evaluation", recorded, runtime, inputs, provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        sample = choose_sentences(corpus, subject.sae.cfg.provenance, config)
        fitted = _fit(subject, corpus, sample.fitted, runtime)
        rivals = baselines(subject.sae, fitted, config.seed)
        accumulated = _evaluate(subject, corpus, sample.evaluated, rivals, runtime)
        found = figures(accumulated, subject.sae.cfg, _conditions(config, subject, corpus, sample, accumulated))
        names = []
        if runtime.is_main:
            text = json.dumps(found, indent=1) + "\n"
            contents = {
                "evaluation.json": text.encode(),
                "evaluation.md": markdown(found).encode(),
                "densities.png": plot_densities(accumulated.firing_counts, accumulated.tokens),
            }
            names = [builder.publish(name, content).name for name, content in contents.items()]
        builder.finish(names, {"sentences": len(sample.evaluated), "tokens": accumulated.tokens})

    def shown(name: str) -> float:
        value = found[name]["value"]
        return math.nan if value is None else value

    log.info(
        "%s: fvu %.4f (mean %.4f, PCA %.4f, random SAE %.4f), l0 %.1f, dead %.2f %%, CE recovered %.4f, KL %.4f on %s tokens",
        config.out, *map(shown, ("fvu", "fvu_mean", "fvu_pca", "fvu_random_sae", "l0")), 100 * shown("dead_fraction"),
        shown("ce_recovered"), shown("kl"), f"{accumulated.tokens:,}",
    )  # fmt: skip


def open_subject(config: EvaluateConfig, device: torch.device) -> Subject:
    """Load SAE, model and tokenizer; ValueError naming both values where they do not belong together."""
    sae = load(config.sae, device)
    tokenizer = load_tokenizer(config.model)
    wanted = sae.cfg.provenance | {"d_model": sae.cfg.d_model}
    check_provenance(f"--model {config.model}", wanted, {"tokenizer_hash": tokenizer.hash}, ["tokenizer_hash"])
    model = load_model(config.model, device)
    if not config.other_weights:
        check_provenance(f"--model {config.model}", wanted, {"model_hash": model.weights_hash}, ["model_hash"])
    check_provenance(f"--model {config.model}", wanted, {"d_model": model.width(sae.site)}, ["d_model"])
    return Subject(sae, model, tokenizer, config.batch_tokens)


def choose_sentences(corpus: Corpus, provenance: dict[str, Any], config: EvaluateConfig) -> Sample:
    """Held-out sentences where there are any, and as many others to fit the mean and PCA on: random, in order of id."""
    fraction, seed = provenance.get("validation_fraction") or 0.0, provenance.get("split_seed") or 0
    documents = torch.cat([torch.tensor(corpus.table(i)["document_id"].to_numpy()) for i in range(len(corpus.files))])
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(documents), generator=generator)
    same_corpus = provenance.get("corpus_hash") == corpus.manifest_hash
    validation = held_out(documents, fraction, seed)[order]
    if same_corpus and validation.any() and not validation.all():
        evaluated, fitted, split = order[validation], order[~validation], "validation documents"
    else:
        split = "all documents of the training corpus" if same_corpus else "all documents of another corpus"
        half = len(order) // 2
        evaluated, fitted = (order[:half], order[half:]) if half else (order, order)
    n = min(config.sentences or len(evaluated), len(evaluated))
    return Sample(evaluated[:n].sort().values, fitted[:n].sort().values, split)


class Batch(NamedTuple):
    """Sentences padded on the right: tokens (B, T) int64, and which of them are real (B, T)."""

    tokens: Tensor
    real: Tensor


def batches(subject: Subject, texts: Sequence[str]) -> Iterator[Batch]:
    """The sentences as the SAE's activations were captured: cut to the same length, BOS in front or not, none that is empty."""
    max_length = subject.sae.cfg.provenance.get("max_length")
    encoded = [ids for ids in (subject.tokenizer.encode(text)[:max_length] for text in texts) if ids]
    encoded = [subject.bos + ids for ids in sorted(encoded, key=len)]
    start = 0
    while start < len(encoded):
        stop = start + 1
        while stop < len(encoded) and (stop + 1 - start) * len(encoded[stop]) <= subject.batch_tokens:
            stop += 1
        lengths = torch.tensor([len(ids) for ids in encoded[start:stop]])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.zeros(real.shape, dtype=torch.long)
        tokens[real] = torch.tensor([token for ids in encoded[start:stop] for token in ids])
        yield Batch(tokens.to(subject.model.device), real.to(subject.model.device))
        start = stop


def _lanes(
    subject: Subject, corpus: Corpus, ids: Tensor, runtime: Runtime, label: str
) -> Iterator[tuple[int, Iterator[Batch]]]:
    """This rank's lanes, each with its batches in order."""
    chunks = torch.split(ids, CHUNK_SENTENCES)
    lanes = runtime.share(LANES)
    with Progress(label, sum(len(chunks[lane::LANES]) for lane in lanes), "chunks", runtime) as bar:

        def read(lane: int) -> Iterator[Batch]:
            for chunk in chunks[lane::LANES]:
                yield from batches(subject, corpus.texts(chunk))
                bar.update(1)

        for lane in lanes:
            yield lane, read(lane)


def _merged(parts: dict[int, Any], runtime: Runtime) -> Any:
    """What the lanes of all ranks gathered, merged in order of lane."""
    every = {lane: part for of_rank in runtime.gather_objects(parts) for lane, part in of_rank.items()}
    whole = every[0]
    for lane in range(1, LANES):
        whole.merge(every[lane])
    return whole


@torch.inference_mode()
def _fit(subject: Subject, corpus: Corpus, ids: Tensor, runtime: Runtime) -> Covariance:
    """Mean and covariance of x over the sentences `ids`."""
    parts = {}
    for lane, lane_batches in _lanes(subject, corpus, ids, runtime, "mean and covariance"):
        parts[lane] = Covariance.none(subject.sae.cfg.d_model)
        for batch in lane_batches:
            x = subject.model.capture(batch.tokens, [subject.sae.site])[subject.sae.site]
            parts[lane].add(x[subject.kept(x, batch.real)].float())
    whole: Covariance = _merged(parts, runtime)
    return whole


@torch.inference_mode()
def _evaluate(subject: Subject, corpus: Corpus, ids: Tensor, rivals: Baselines, runtime: Runtime) -> Accumulator:
    """All sums over the sentences `ids`. ValueError where they hold no token to evaluate."""
    cfg, parts = subject.sae.cfg, {}
    most_active = cfg.k if subject.sae.selects_top_k else cfg.n_latents
    for lane, lane_batches in _lanes(subject, corpus, ids, runtime, "evaluating"):
        parts[lane] = Accumulator.none(cfg.d_model, cfg.n_latents, most_active)
        for batch in lane_batches:
            evaluate_batch(subject, batch, rivals, parts[lane])
    accumulated: Accumulator = _merged(parts, runtime)
    if accumulated.tokens == 0:
        raise ValueError(f"{corpus.artifact.path}: the {len(ids)} sentences chosen hold no token to evaluate; give more text")
    return accumulated


def evaluate_batch(subject: Subject, batch: Batch, rivals: Baselines, accumulated: Accumulator) -> None:
    """Run the model once as it is and once with each stand-in for x, and add what comes out to `accumulated`."""
    seen: list[Tensor] = []
    logits = _logits(subject, batch, seen.append)
    x = seen[0]
    kept = subject.kept(x, batch.real)
    rows = x[kept].float()
    latents = subject.sae.encode(rows)
    x_hat = subject.sae.decode(latents, subject.sae.normalise(rows))
    accumulated.excluded += int(batch.real.sum()) - len(subject.bos) * len(batch.real) - len(rows)
    accumulated.add_reconstruction(rows, x_hat, latents)
    for name, residual in rivals.residuals(rows).items():
        accumulated.add(name, residual.double().square())
    predicted = batch.real[:, 1:]
    targets = batch.tokens[:, 1:][predicted]
    accumulated.targets += len(targets)
    clean = logits[:, :-1][predicted].float().log_softmax(-1)
    accumulated.add("ce_clean", F.nll_loss(clean, targets, reduction="none"))
    stand_ins = {"sae": x_hat, "zero": torch.zeros_like(rows), "mean": rivals.mean.to(rows).expand_as(rows)}
    for name in SPLICES:
        edited = _logits(subject, batch, _replacing(kept, stand_ins[name]))[:, :-1][predicted].float().log_softmax(-1)
        accumulated.add(f"ce_{name}", F.nll_loss(edited, targets, reduction="none"))
        accumulated.add(f"kl_{name}", (clean.exp() * (clean - edited)).sum(-1))


def _logits(subject: Subject, batch: Batch, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
    """No mask is needed: padding stands on the right, where a causal model does not look from a real token."""
    with subject.model.hooks({subject.sae.site: hook}):
        logits: Tensor = subject.model(batch.tokens)
    return logits


def _replacing(kept: Tensor, rows: Tensor) -> Callable[[Tensor], Tensor]:
    def replace_rows(x: Tensor) -> Tensor:
        x = x.clone()
        x[kept] = rows.to(x.dtype)
        return x

    return replace_rows


def _conditions(
    config: EvaluateConfig, subject: Subject, corpus: Corpus, sample: Sample, accumulated: Accumulator
) -> dict[str, Any]:
    """What every figure depends on, besides the weights."""
    provenance = subject.sae.cfg.provenance
    return {
        "model": provenance.get("model"),
        "model_dtype": str(subject.model.dtype).removeprefix("torch."),
        "sae_dtype": str(subject.sae.W_enc.dtype).removeprefix("torch."),
        "site": subject.sae.site,
        "bos": "fed, not counted" if subject.bos else "none",
        "max_length": provenance.get("max_length"),
        "max_norm": provenance.get("max_norm"),
        "tokens": accumulated.tokens,
        "excluded_tokens": accumulated.excluded,
        "predicted_tokens": accumulated.targets,
        "sentences": len(sample.evaluated),
        "split": sample.split,
        "corpus_hash": corpus.manifest_hash,
        "sae_hash": subject.sae.weights_hash,
        "seed": config.seed,
        "fitted_sentences": len(sample.fitted),
    }


if __name__ == "__main__":
    run_stage(EvaluateConfig, run, __doc__ or "")

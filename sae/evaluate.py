"""How good an SAE is: reconstruction on held-out sentences, and what the model loses when it must live with it.

    python -m sae.evaluate --sae run/sae --model M --corpus corpus/ --out evaluation/
    python -m sae.evaluate --sae run/sae --compare other/sae third/sae --model M --corpus corpus/ --out evaluation/
    torchrun --nproc_per_node=8 -m sae.evaluate ... --sentences 20000

The model reads sentences of held-out documents once; from the SAE's site on it runs again with x replaced by each
reconstruction, by zero and by the mean. evaluation.md has the SAEs beside mean, PCA, a random SAE and the identity, with 95 %
intervals over documents; evaluation.json has every figure with its definition and conditions, compared.json the figures of the
other columns, core.json those of the SAE in SAEBench's form. docs/metrics.md explains the figures.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capture.store import Corpus, open_corpus
from core.artifact import building, check_provenance, open_artifact
from core.cli import Progress, StageConfig, run_stage
from core.runtime import Runtime
from sae.accumulator import Accumulator, Covariance
from sae.evaluating.bootstrap import groups_of
from sae.evaluating.contenders import Contender, baselines, of_sae
from sae.evaluating.figures import Figure, described, figures_of, of_weights
from sae.evaluating.pages import markdown, plot_densities
from sae.evaluating.saebench import core_results
from sae.evaluating.splicing import Spliced, losses
from sae.evaluating.subject import Batch, Sample, Subject, batches, choose_sentences, open_subject
from sae.evaluating.weights import weight_figures
from sae.model import SAE, load

log = logging.getLogger("sae.evaluate")

CHUNK_SENTENCES = 128  # batches form inside a chunk only
LANES = 8  # chunk i belongs to lane i mod 8 and lanes are merged in order: up to 8 ranks, the same sums
ALIKE = ("model_hash", "tokenizer_hash", "site", "bos", "max_length")
"""What SAEs must have in common to be compared in one pass."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """Flags of the stage."""

    sae: Path
    """Folder of an SAE: run/sae."""
    model: str
    """The model that its activations came from: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo."""
    corpus: Path
    """Corpus folder; where it is the one that an SAE was trained on, only documents held out from its training are used."""
    out: Path
    """Folder to write."""
    compare: tuple[Path, ...] = ()
    """Further SAEs of the same site, for the table: on the same tokens, in the same passes of the model. Tokens that --sae
    leaves out for their norm are left out for all."""
    sentences: int = 1000
    """Sentences evaluated, drawn at random, and as many others for the mean and PCA; 0: all."""
    batch_tokens: int = 4096
    """Token slots of a forward pass, padding included. Part of the result: the last bits differ with the shape of a batch."""
    baseline_losses: bool = False
    """Run the model on the reconstructions of PCA, the random SAE and the identity too: half as long again."""
    resamples: int = 1000
    """Resamples of documents behind each interval; 0: no intervals."""
    other_weights: bool = False
    """Accept a model whose weights are not those that the SAE was trained on, such as the unquantised copy of a quantised
    model: the evaluation then says what the SAE is worth there."""

    def __post_init__(self) -> None:
        if self.sentences < 0 or self.batch_tokens < 1 or self.resamples < 0:
            raise ValueError(
                "--sentences and --resamples must not be negative, and --batch-tokens at least 1; found "
                f"{self.sentences}, {self.resamples}, {self.batch_tokens}"
            )


def run(config: EvaluateConfig, runtime: Runtime) -> None:
    """Write the evaluation folder."""
    corpus = open_corpus(config.corpus)
    subject = open_subject(config.sae, config.model, runtime.device, config.batch_tokens, config.other_weights)
    saes = {name_of(config.sae, config.compare): subject.sae} | open_compared(config, subject.sae, runtime.device)
    provenance = {name: subject.sae.cfg.provenance.get(name) for name in ("model", "model_hash", "tokenizer_hash", "site")}
    provenance |= {"sae_hash": subject.sae.weights_hash, "corpus_hash": corpus.manifest_hash}
    provenance["model_hash"] = subject.model.weights_hash
    recorded = replace(config, model=str(provenance["model"]))
    inputs = [*(open_artifact(path, "sae") for path in (config.sae, *config.compare)), corpus.artifact]
    with building(config.out, "evaluation", recorded, runtime, inputs, provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        trained_on = [sae.cfg.provenance for sae in saes.values()]
        sample = choose_sentences(corpus, trained_on, config.sentences, config.seed)
        fitted = _fit(subject, corpus, sample.fitted, runtime)
        rivals = baselines(subject.sae, fitted, config.seed)
        contenders = [*(of_sae(name, sae) for name, sae in saes.items()), *rivals.contenders(config.baseline_losses)]
        found = _evaluate(subject, corpus, sample, contenders, rivals.mean, runtime)
        names = []
        table: dict[str, dict[str, Figure]] = {}
        if runtime.is_main:
            table = {name: figures_of(sums, config.resamples, config.seed) for name, sums in found.items()}
            contents = _contents(subject, saes, found, table, _conditions(config, subject, corpus, sample, found))
            names = [builder.publish(name, content).name for name, content in contents.items()]
        builder.finish(names, {"sentences": len(sample.evaluated), "tokens": next(iter(found.values())).tokens})
    for name in table:
        _say(config.out, name, table[name])


def _say(out: Path, name: str, found: dict[str, Figure]) -> None:
    """One line on a column of the table."""
    shown = {"fvu": "FVU", "l0": "L0", "dead_fraction": "dead", "ce_recovered": "CE recovered", "kl": "KL"}
    text = ", ".join(f"{label} {found[key].value:.4f}" for key, label in shown.items() if key in found)
    log.info("%s: %s: %s", out, name, text)


def name_of(path: Path, others: Sequence[Path]) -> str:
    """How the table calls an SAE: the last parts of its folder's name, as many as tell it from `others`; "sae" says nothing."""
    parts = path.parts[:-1] if path.name == "sae" and len(path.parts) > 1 else path.parts
    rest = Counter(other.parts[:-1] if other.name == "sae" else other.parts for other in others if other != path)
    for n in range(1, len(parts)):
        if all(other[-n:] != parts[-n:] for other in rest):
            return "/".join(parts[-n:])
    return "/".join(parts)


def open_compared(config: EvaluateConfig, sae: SAE, device: torch.device) -> dict[str, SAE]:
    """The SAEs of --compare by name; ValueError where one cannot be evaluated in the same passes as `sae`, or comes twice."""
    found: dict[str, SAE] = {}
    for path in config.compare:
        name = name_of(path, [config.sae, *config.compare])
        if path == config.sae or name in found:
            raise ValueError(f"--compare {path}: stands there twice; give each SAE once, and that of --sae not at all")
        found[name] = load(path, device)
        check_provenance(f"--compare {path}", sae.cfg.provenance, found[name].cfg.provenance, ALIKE)
    return found


def _lanes(
    subject: Subject, corpus: Corpus, ids: Tensor, groups: Tensor, runtime: Runtime, label: str
) -> Iterator[tuple[int, Iterator[Batch]]]:
    """This rank's lanes, each with its batches in order; `groups` like `ids`."""
    chunks = list(zip(torch.split(ids, CHUNK_SENTENCES), torch.split(groups, CHUNK_SENTENCES), strict=True))
    lanes = runtime.share(LANES)
    total = sum(len(chunk) for lane in lanes for chunk, _ in chunks[lane::LANES])
    with Progress(label, total, "sentences", runtime) as bar:

        def read(lane: int) -> Iterator[Batch]:
            for chunk, of_chunk in chunks[lane::LANES]:
                left = len(chunk)
                for batch in batches(subject, corpus.texts(chunk), of_chunk.tolist()):
                    yield batch
                    left -= len(batch.tokens)
                    bar.update(len(batch.tokens))
                bar.update(left)  # the empty ones

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
    for lane, lane_batches in _lanes(subject, corpus, ids, torch.zeros_like(ids), runtime, "mean and covariance"):
        parts[lane] = Covariance.none(subject.sae.cfg.d_model)
        for batch in lane_batches:
            x = subject.model.capture(batch.tokens, [subject.sae.site])[subject.sae.site]
            parts[lane].add(x[subject.kept(x, batch.real)].float())
    whole: Covariance = _merged(parts, runtime)
    return whole


class _Parts(dict[str, Accumulator]):
    """The sums of all contenders."""

    def merge(self, other: "_Parts") -> None:
        for name, sums in self.items():
            sums.merge(other[name])


@torch.inference_mode()
def _evaluate(
    subject: Subject, corpus: Corpus, sample: Sample, contenders: Sequence[Contender], mean: Tensor, runtime: Runtime
) -> dict[str, Accumulator]:
    """All sums over the sentences evaluated, by contender. ValueError where they hold no token to evaluate."""
    ids = sample.evaluated
    groups = groups_of(torch.tensor(corpus.document_ids(ids)))
    parts = {}
    for lane, lane_batches in _lanes(subject, corpus, ids, groups, runtime, "evaluating"):
        parts[lane] = _Parts({contender.name: contender.sums(int(groups.max()) + 1) for contender in contenders})
        for batch in lane_batches:
            evaluate_batch(subject, batch, contenders, mean, parts[lane])
    found: _Parts = _merged(parts, runtime)
    if next(iter(found.values())).tokens == 0:
        raise ValueError(f"{corpus.artifact.path}: the {len(ids)} sentences chosen hold no token to evaluate; give more text")
    return dict(found)


def evaluate_batch(
    subject: Subject, batch: Batch, contenders: Sequence[Contender], mean: Tensor, parts: dict[str, Accumulator]
) -> None:
    """Run the model once as it is, and from the site on with each stand-in for x; add what comes out to `parts`."""
    spliced = Spliced(subject.model, subject.sae.site, batch.tokens)
    kept = subject.kept(spliced.x, batch.real)
    rows = spliced.x[kept].float()
    sentences = torch.arange(len(batch.tokens), device=kept.device)[:, None].expand_as(kept)
    of_tokens = batch.groups[:, None].expand_as(kept)
    predicted = batch.real[:, 1:]

    def read(hidden: Tensor) -> Tensor:
        return hidden[:, :-1][predicted]

    hidden = {"zero": read(spliced.replaced(kept, torch.zeros_like(rows)))}
    hidden["mean"] = read(spliced.replaced(kept, mean.to(rows).expand_as(rows)))
    for contender in contenders:
        sums = parts[contender.name]
        x_hat, latents = contender.reconstruct(rows)
        sums.excluded += int(batch.real.sum()) - len(subject.bos) * len(batch.real) - len(rows)
        sums.add_reconstruction(rows, x_hat, latents, of_tokens[kept], sentences[kept])
        if contender.spliced:
            hidden[f"sae of {contender.name}"] = read(spliced.replaced(kept, x_hat))
    clean, found = losses(subject.model.output, read(spliced.hidden), hidden, batch.tokens[:, 1:][predicted])
    groups = of_tokens[:, 1:][predicted]
    for contender in contenders:
        own = "mean" if contender.name == "mean" else f"sae of {contender.name}"
        if own not in found:
            continue
        sums = parts[contender.name]
        sums.add("targets", torch.ones_like(clean), groups)
        sums.add("ce_clean", clean, groups)
        for name, key in (("zero", "zero"), ("mean", "mean"), ("sae", own)):
            sums.add(f"ce_{name}", found[key][0], groups)
            sums.add(f"kl_{name}", found[key][1], groups)


def _contents(
    subject: Subject,
    saes: dict[str, SAE],
    found: dict[str, Accumulator],
    table: dict[str, dict[str, Figure]],
    conditions: dict[str, Any],
) -> dict[str, bytes]:
    """The files of the folder. Figures of weights are added to `table`."""
    weights = {name: weight_figures(sae) for name, sae in saes.items()}
    for name, of_name in weights.items():
        table[name] |= of_weights(of_name)
    first, cfg = next(iter(saes)), subject.sae.cfg
    of_rivals = (table[name]["fvu"] for name in list(table)[len(saes) :])
    own = table[first] | dict(zip(("fvu_pca", "fvu_random_sae", "fvu_mean"), of_rivals, strict=False))
    compared = {
        name: {figure: value.record() for figure, value in column.items()} for name, column in table.items() if name != first
    }
    core = core_results(own, found[first], weights[first], cfg, conditions)
    return {
        "evaluation.json": _json(described(own, found[first], cfg, conditions)),
        "compared.json": _json(compared),
        "core.json": _json(core),
        "evaluation.md": markdown(table, conditions).encode(),
        "densities.png": plot_densities(found[first].firing_counts, found[first].tokens),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _conditions(
    config: EvaluateConfig, subject: Subject, corpus: Corpus, sample: Sample, found: dict[str, Accumulator]
) -> dict[str, Any]:
    """What every figure depends on, besides the weights."""
    provenance, accumulated = subject.sae.cfg.provenance, next(iter(found.values()))
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
        "predicted_tokens": int(accumulated.total("targets")),
        "sentences": len(sample.evaluated),
        "documents": len(set(corpus.document_ids(sample.evaluated))),
        "split": sample.split,
        "corpus_hash": corpus.manifest_hash,
        "sae_hash": subject.sae.weights_hash,
        "seed": config.seed,
        "fitted_sentences": len(sample.fitted),
        "resamples": config.resamples,
    }


if __name__ == "__main__":
    run_stage(EvaluateConfig, run, __doc__ or "")

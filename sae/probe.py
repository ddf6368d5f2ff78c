"""What a few latents know of labelled texts, beside the same probe on the activations themselves; and latents as alarms.

    python -m sae.probe --sae run/sae --model M --corpus labelled/ --out probe/

The corpus has labels (`label` column of its source). For each label, a logistic regression on the 1, 2, 5 and 20 latents that
tell it best stands beside one on as many raw dimensions and principal components, on all dimensions, and beside the difference
of means: fitted on some documents, scored on others. An alarm is the latent that finds the label best, with the threshold for
--false-alarms. probe.md has the tables, probe.json all of it. Needs scikit-learn: pip install 'llama3-sae[science]'.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from capture.store import Corpus, open_corpus
from core.artifact import building, open_artifact
from core.cli import StageConfig, run_stage
from core.runtime import Runtime
from sae.evaluating.subject import open_subject
from sae.probing.texts import read
from sae.split import held_out

log = logging.getLogger("sae.probe")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(StageConfig):
    """Flags of the stage."""

    sae: Path
    """Folder of an SAE: run/sae."""
    model: str
    """The model that its activations came from: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo."""
    corpus: Path
    """Corpus folder whose sentences have labels; those without are not used."""
    out: Path
    """Folder to write."""
    sentences: int = 2000
    """Labelled sentences used, drawn at random; 0: all."""
    latents: tuple[int, ...] = (1, 2, 5, 20)
    """Numbers of latents, dimensions or components that a probe may read."""
    test_fraction: float = 0.3
    """Share of documents that probes are scored on."""
    false_alarms: float = 0.01
    """Rate of false alarms, per sentence without the label, that thresholds are set for."""
    resamples: int = 200
    """Resamples of documents behind each interval."""
    batch_tokens: int = 4096
    """Token slots of a forward pass, padding included."""
    other_weights: bool = False
    """Accept a model whose weights are not those that the SAE was trained on."""

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1 or not 0 <= self.false_alarms < 1:
            raise ValueError(
                "--test-fraction must lie between 0 and 1, and --false-alarms from 0 to below 1; found "
                f"{self.test_fraction}, {self.false_alarms}"
            )
        if min((*self.latents, 0)) < 0 or 0 in self.latents or not self.latents or min(self.sentences, self.resamples) < 0:
            raise ValueError(
                "--latents must be at least 1 each, --sentences and --resamples not negative; found "
                f"{self.latents}, {self.sentences}, {self.resamples}"
            )


def run(config: ProbeConfig, runtime: Runtime) -> None:
    """Write the folder. Rank 0 does the work: texts are few."""
    try:
        from sae.probing.tables import Labelled, Probing, markdown, probe_labels
    except ImportError as error:
        raise ValueError(f"sae.probe needs {error.name}: pip install 'llama3-sae[science]'") from None
    sae_artifact, corpus = open_artifact(config.sae, "sae"), open_corpus(config.corpus)
    subject = open_subject(config.sae, config.model, runtime.device, config.batch_tokens, config.other_weights)
    known = subject.sae.cfg.provenance
    provenance = {name: known.get(name) for name in ("model", "tokenizer_hash", "site")}
    provenance |= {"model_hash": subject.model.weights_hash, "sae_hash": subject.sae.weights_hash}
    recorded = replace(config, model=str(known.get("model")))
    provenance["corpus_hash"] = corpus.manifest_hash
    with building(config.out, "probe", recorded, runtime, [sae_artifact, corpus.artifact], provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        ids, labels = labelled(corpus, config)
        names = []
        if runtime.is_main:
            documents = torch.tensor(corpus.document_ids(ids))
            test = held_out(documents, config.test_fraction, config.seed)
            texts = read(subject, corpus, ids, runtime)
            how = Probing(config.latents, config.false_alarms, config.resamples, config.seed)
            found = probe_labels(how, texts, Labelled(labels, documents, test))
            contents = {"probe.json": json.dumps(found, indent=1) + "\n", "probe.md": markdown(found)}
            names = [builder.publish(name, content.encode()).name for name, content in contents.items()]
            log.info("%s: %d labels, %d sentences", config.out, len(found["labels"]), len(ids))
        builder.finish(names, {"sentences": len(ids)})


def labelled(corpus: Corpus, config: ProbeConfig) -> tuple[Tensor, list[str]]:
    """Sentences with a label, drawn at random, in order of id, and their labels. ValueError with fewer than two labels."""
    every: list[str | None] = [label for i in range(len(corpus.files)) for label in corpus.table(i)["label"].to_pylist()]
    ids = torch.tensor([i for i, label in enumerate(every) if label is not None], dtype=torch.long)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(config.seed))
    ids = ids[order][: config.sentences or None].sort().values
    labels = [str(every[i]) for i in ids.tolist()]
    if len(set(labels)) < 2:
        raise ValueError(
            f"{config.corpus}: expected sentences with at least two labels, found {dict(Counter(labels)) or 'none'}; "
            "capture.sentences keeps the label field of its source"
        )
    return ids, labels


if __name__ == "__main__":
    run_stage(ProbeConfig, run, __doc__ or "")

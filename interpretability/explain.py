"""A title, an explanation and a score for every latent, from its top sentences.

    python -m interpretability.explain run --top top/ --corpus corpus/ --out explanations/

`run` asks a backend and writes what it says. The backend here, `token_statistics`, needs no model: see
`interpretability/token_statistics.py`. Latents that never fire are recorded as failed.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from tyro.conf import Positional

from capture.store import Corpus, open_corpus
from core.artifact import building, check_provenance
from core.cli import Progress, StageConfig, machine, run_stage
from core.runtime import Runtime
from interpretability.records import EXPLANATIONS_FILE, Explanation, PoolSentence, TopSentences, explanation_lines, open_top
from interpretability.token_statistics import TokenStatistics

MAX_COMPARED = 100_000
"""Sentences of the corpus that are counted."""

log = logging.getLogger("interpretability.explain")


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(StageConfig):
    """Flags of `python -m interpretability.explain`."""

    action: Positional[Literal["run"]] = machine()
    """run: explain every latent now and wait for it."""
    top: Path
    """Folder of top sentences."""
    corpus: Path | None = None
    """Folder of their corpus: what a latent's sentences are compared with. None: the top sentences of the other latents."""
    out: Path
    """Folder to write."""
    backend: Literal["token_statistics"] = "token_statistics"
    """Who explains. token_statistics: counts alone, no model."""
    others: int = 1000
    """Sentences, drawn by --seed, against which labels are weighed and scored."""

    def __post_init__(self) -> None:
        if self.others < 1:
            raise ValueError(f"--others must be at least 1; found {self.others}")


class Backend(Protocol):
    """Whoever writes explanations."""

    @property
    def name(self) -> str:
        """Recorded as `method`."""
        ...

    @property
    def model(self) -> str:
        """Recorded as `model`; empty where there is none."""
        ...

    def explain(self, latents: Sequence[int]) -> Iterator[Explanation]:
        """One explanation for each of `latents`, in that order; what cannot be explained is `failed` with its reason."""
        ...


BACKENDS: dict[str, Callable[[TopSentences, Sequence[PoolSentence], ExplainConfig], Backend]] = {
    "token_statistics": lambda top, rest, config: TokenStatistics(top, rest, config.others, config.seed),
}


def sentences_to_compare(top: TopSentences, corpus: Corpus | None) -> list[PoolSentence]:
    """The corpus, or MAX_COMPARED sentences evenly from it; without one, the top sentences of all latents, each once.

    Raises ValueError where it is not the corpus that the top sentences come from.
    """
    if corpus is None:
        return top.pool()
    what, found = f"corpus {corpus.artifact.path}", {"corpus_hash": corpus.manifest_hash}
    check_provenance(what, top.provenance, found, ("corpus_hash",))
    ids = np.linspace(0, corpus.n_sentences - 1, min(corpus.n_sentences, MAX_COMPARED)).astype(np.int64)
    return [PoolSentence(*row) for row in zip(ids.tolist(), corpus.texts(ids), corpus.labels(ids), strict=True)]


def run(config: ExplainConfig, runtime: Runtime) -> None:
    """Write the folder `config.out` of kind `explanations`; under torchrun, rank 0 does."""
    top = open_top(config.top)
    if "max" not in top.aggregations:
        raise ValueError(f"{config.top}: explanations need the aggregation max, found {', '.join(top.aggregations)}")
    corpus = open_corpus(config.corpus) if config.corpus else None
    rest = sentences_to_compare(top, corpus) if runtime.is_main else []
    inputs = [top.artifact, *([corpus.artifact] if corpus else [])]
    with building(config.out, "explanations", config, runtime, inputs, top.provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        states: Counter[str] = Counter()
        if runtime.is_main:
            backend = BACKENDS[config.backend](top, rest, config)
            explanations = backend.explain(range(top.n_latents))
            lines = explanation_lines(_counted(explanations, states, Progress("explain", top.n_latents, "latents", runtime)))
            builder.publish(EXPLANATIONS_FILE, lines, rows=top.n_latents)
        builder.finish([EXPLANATIONS_FILE] if runtime.is_main else [], {"latents": top.n_latents, **states})
    log.info(
        "%s: %s latents explained by %s, %s failed",
        config.out, f"{states['valid']:,}", config.backend, f"{states['failed']:,}",
    )  # fmt: skip


def _counted(explanations: Iterable[Explanation], states: Counter[str], progress: Progress) -> Iterator[Explanation]:
    with progress as bar:
        for explanation in explanations:
            states[explanation.state] += 1
            bar.update(1)
            yield explanation


if __name__ == "__main__":
    run_stage(ExplainConfig, run, __doc__ or "")

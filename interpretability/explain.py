"""A title, an explanation and a score for every latent, from its top sentences.

    python -m interpretability.explain run --top top/ --corpus corpus/ --out explanations/
    python -m interpretability.explain run --top top/ --out explanations/ --backend anthropic --latents 0-99 --budget 1
    python -m interpretability.explain submit|status|collect --top top/ --out explanations/ --backend anthropic

`run` asks a backend and waits for it. `submit` sends batches and leaves, `status` tells how they stand, `collect` fetches what
has ended and writes the explanations once all is there; the same command sends again what expired. The backend
`token_statistics` needs no model: see `interpretability/labels/token_statistics.py`. Latents without a sentence
are recorded as failed, with the reason.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

import numpy as np
from tyro.conf import Positional

from capture.store import Corpus, open_corpus
from core.artifact import building, check_provenance
from core.cli import Progress, machine, run_stage
from core.runtime import Runtime
from core.terminal import say
from interpretability.labels.llm_explainer import LLMExplainer
from interpretability.labels.prompts import Style
from interpretability.labels.readings import Read, read_readings
from interpretability.labels.token_statistics import TokenStatistics
from interpretability.llm.backends import KeptAsker, LLMBackend, asker_of
from interpretability.llm.client import AskConfig, check_failures
from interpretability.records import (
    EXPLANATIONS_FILE,
    NOTHING_TO_SHOW,
    Explanation,
    PoolSentence,
    TopSentences,
    compressed,
    explanation_lines,
    open_top,
    read_explanations,
)

if TYPE_CHECKING:
    from interpretability.llm.message_batches import BatchAsker

MAX_COMPARED = 100_000
"""Sentences of the corpus that are counted."""

log = logging.getLogger("interpretability.explain")


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(AskConfig):
    """Flags of `python -m interpretability.explain`."""

    action: Positional[Literal["run", "submit", "status", "collect"]] = machine()
    """run: explain now and wait. submit, status, collect: the same in steps, for the backend anthropic."""
    top: Path
    """Folder of top sentences."""
    corpus: Path | None = None
    """token_statistics: folder of their corpus, which a latent's sentences are compared with. None: the top sentences of the
    other latents."""
    out: Path
    """Folder to write."""
    backend: Literal["token_statistics"] | LLMBackend = "token_statistics"
    """Who explains. token_statistics: counts alone, no model. anthropic: Message Batches. openai: any server that speaks its
    chat completions. llama: a Llama in this process."""
    readings: Path | None = None
    """token_statistics: a file of titles and explanations that a reader wrote (interpretability/labels/readings.py), which
    stand in place of the counted ones and are scored like them."""
    style: Style = "semantic"
    """What a language model is asked for. semantic: what the sentences share, and how certain that is. title: dominant tokens,
    patterns, summary, context and title."""
    latents: str = ""
    """Latents to explain, such as 0-99,205. Empty: all."""
    examples: int = 20
    """Sentences shown to a language model for each latent, at most; every second top sentence is kept for scoring."""
    others: int = 1000
    """token_statistics: sentences, drawn by --seed, against which labels are weighed and scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.others < 1 or self.examples < 1:
            raise ValueError(f"--others and --examples must be at least 1; found {self.others} and {self.examples}")
        if self.action != "run" and self.backend != "anthropic":
            raise ValueError(f"{self.action}: only the backend anthropic works in steps; give run for {self.backend}")
        if self.readings and self.backend != "token_statistics":
            raise ValueError(f"--readings: a reader takes the place of --backend {self.backend}; leave one of them out")


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


def chosen(text: str, n_latents: int) -> list[int]:
    """The latents that a flag such as `0-99,205` names, in order; all where it is empty. ValueError for any other."""
    found: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()) or not int(first) <= int(last or first) < n_latents:
            raise ValueError(f"--latents {text}: {part!r} is no latent or range of latents from 0 to {n_latents - 1}")
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found) if text else list(range(n_latents))


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
    if config.action != "run" and runtime.world_size > 1:
        raise ValueError(f"{config.action}: works in one process; leave torchrun out")
    top = open_top(config.top)
    if "max" not in top.aggregations:
        raise ValueError(f"{config.top}: explanations need the aggregation max, found {', '.join(top.aggregations)}")
    latents = chosen(config.latents, top.n_latents)
    corpus = open_corpus(config.corpus) if config.corpus else None
    rest = sentences_to_compare(top, corpus) if runtime.is_main and config.backend == "token_statistics" else []
    readings = read_readings(config.readings, top.provenance["sae_hash"], top.n_latents) if config.readings else None
    inputs = [top.artifact, *([corpus.artifact] if corpus else [])]
    provenance = top.provenance | ({"readings_hash": readings.hash} if readings else {})
    with building(config.out, "explanations", config, runtime, inputs, provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            _check_failures(config, runtime)
            return
        states: Counter[str] = Counter()
        names = [EXPLANATIONS_FILE]
        if runtime.is_main:
            if config.backend == "token_statistics":
                counted = TokenStatistics(top, rest, config.others, config.seed)
                explanations = (Read(counted, readings) if readings else counted).explain(latents)
            else:
                asker = asker_of(config.backend, config, builder, runtime.device)
                found = _asked(config, asker, top, latents)
                if found is None:
                    return
                explanations = iter(found)
                names += asker.files
            lines = explanation_lines(_counted(explanations, states, Progress("explain", len(latents), "latents", runtime)))
            builder.publish(EXPLANATIONS_FILE, compressed(lines), rows=len(latents))
        builder.finish(names if runtime.is_main else [], {"latents": len(latents), **states})
    log.info(
        "%s: %s latents explained by %s, %s failed",
        config.out, f"{states['valid']:,}", config.backend, f"{states['failed']:,}",
    )  # fmt: skip
    _check_failures(config, runtime)


def _check_failures(config: ExplainConfig, runtime: Runtime) -> None:
    """ValueError where too many of the latents with sentences have no explanation in the finished folder."""
    if runtime.is_main:
        asked = [found for found in read_explanations(config.out).values() if found.reason not in NOTHING_TO_SHOW]
        check_failures(config, sum(found.state == "failed" for found in asked), len(asked))


def _asked(config: ExplainConfig, asker: KeptAsker, top: TopSentences, latents: Sequence[int]) -> list[Explanation] | None:
    """What a language model says of each of `latents`; None where this step does not complete it."""
    explainer = LLMExplainer(asker, top, config.style, config.examples)
    if config.action == "run":
        return list(explainer.explain(latents))
    batches = cast("BatchAsker", asker)
    job = batches.job(explainer.requests(latents))
    if config.action == "submit":
        job.submit()
    elif config.action == "collect":
        job.collect()
        if not job.under_way and not job.to_send():
            return list(explainer.explanations(latents, {reply.key: reply for reply in batches.collected(job)}))
    for line in job.status():
        say(line)
    if job.to_send():
        log.info("%s requests are to be sent: give submit", f"{len(job.to_send()):,}")
    return None


def _counted(explanations: Iterable[Explanation], states: Counter[str], progress: Progress) -> Iterator[Explanation]:
    with progress as bar:
        for explanation in explanations:
            states[explanation.state] += 1
            bar.update(1)
            yield explanation


if __name__ == "__main__":
    run_stage(ExplainConfig, run, __doc__ or "")

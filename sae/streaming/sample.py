"""The first chunks of the order: statistics for the start of training, and the validation rows.

    run/sample/<site>/statistics.safetensors, validation-00000.safetensors

What sae.preprocess takes from all rows is taken from a sample here, and kept, so that a run that is
continued begins at once. Shapes: n rows, d width of a site.
"""

import logging
import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from core.artifact import Artifact, Builder, building, open_artifact
from core.cli import progress
from core.runtime import Runtime, unit_generator
from sae.row_statistics import RowStatistics
from sae.streaming.feeder import Passes, SiteRows, of_all_ranks
from sae.streaming.flags import ModelRows

log = logging.getLogger("sae.train")

VALIDATION = "validation-00000.safetensors"


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelRows):
    """The flags of training that decide a sample."""

    rows_seed: int
    threads: int

    @classmethod
    def of(cls, config: Any) -> "SampleConfig":
        """The same flags of a run."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)})


@dataclass
class Gathered:
    """What is known of one site, chunk by chunk."""

    statistics: RowStatistics | None = None
    validation: list[Tensor] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, statistics: RowStatistics, validation: Tensor) -> None:
        if self.statistics is None:
            self.statistics = statistics
        elif statistics.raw.count:
            self.statistics.merge(statistics)
        self.validation.append(validation.cpu())
        self.counts += Counter(train_rows=statistics.raw.count, validation_rows=len(validation))


def sample(
    configs: dict[str, SampleConfig], passes: Passes, folder: Path, runtime: Runtime, most: int
) -> tuple[dict[str, Artifact], dict[int, dict[str, Tensor]]]:
    """The samples of the sites that are the keys of `configs`, taken where they are not there yet.

    And the rows that were computed for that, by ordinal, up to `most` of a site: they come first in
    the stream. Sets the limits of `passes`.
    """
    computed: dict[int, dict[str, Tensor]] = {}
    with ExitStack() as held:
        builders = {}
        for site, config in configs.items():
            provenance = described(passes, site)
            inputs = [passes.chunks.corpus.artifact]
            builders[site] = held.enter_context(building(folder / site, "sample", config, runtime, inputs, provenance))
        missing = [site for site, builder in builders.items() if not builder.complete]
        if missing:
            n_chunks = sample_chunks(configs[missing[0]], len(passes.chunks))
            gathered, medians, computed = _gather(missing, passes, n_chunks, runtime, most)
            for site in missing:
                _publish(builders[site], gathered[site], passes, medians[site], n_chunks, runtime)
    artifacts = {site: open_artifact(folder / site, "sample") for site in configs}
    for site, artifact in artifacts.items():
        limit = artifact.manifest.provenance["max_norm"]
        passes.limits[site] = math.inf if limit is None else limit
    return artifacts, computed if len(missing) == len(configs) else {}


def described(passes: Passes, site: str) -> dict[str, Any]:
    """Provenance of the rows at `site`, as sae.preprocess hands it on."""
    chunks = passes.chunks
    provenance = replace(chunks, how=replace(chunks.how, sites=[site])).provenance()
    width = provenance.pop("widths")[site]
    split = {"validation_fraction": passes.validation_fraction, "split_seed": passes.seed}
    return provenance | split | {"site": site, "d_model": width}


def sample_chunks(config: ModelRows, n_chunks: int) -> int:
    """Chunks of a sample: at most every chunk once."""
    return min(n_chunks, math.ceil(config.statistics_sentences / config.chunk_sentences))


def _gather(
    sites: list[str], passes: Passes, n_chunks: int, runtime: Runtime, most: int
) -> tuple[dict[str, Gathered], dict[str, float], dict[int, dict[str, Tensor]]]:
    """Of `sites`: what the first `n_chunks` chunks hold, the median norm, and rows by ordinal."""
    gathered = {site: Gathered() for site in sites}
    medians: dict[str, float] = {}
    computed: dict[int, dict[str, Tensor]] = {}
    rounds = range(0, n_chunks, runtime.world_size)
    for start in progress(rounds, "statistics", len(rounds), "rounds", runtime):
        ordinal = start + runtime.rank
        captured = passes.get(ordinal, sites) if ordinal < n_chunks else None
        if ordinal + runtime.world_size < n_chunks:
            passes.begin(ordinal + runtime.world_size, sites)
        if start == 0:
            norms = {} if captured is None else captured.norms
            found = {site: _median(x) for site, x in norms.items()}
            medians = runtime.gather_objects(found)[0]
            passes.limits |= {site: passes.limit(median) for site, median in medians.items()}
        for site in sites:
            rows = passes.no_rows(site) if captured is None else passes.rows(captured, site)
            every = _add(gathered[site], rows, runtime)[: n_chunks - start]
            if gathered[site].counts["train_rows"] <= most:
                for number, x in enumerate(every, start):
                    computed.setdefault(number, {})[site] = x
    whole = {number: rows for number, rows in computed.items() if len(rows) == len(sites)}
    return gathered, medians, whole


def _add(gathered: Gathered, rows: SiteRows, runtime: Runtime) -> list[Tensor]:
    """Add the chunks of all ranks, in order; returns the rows of each that are learned from."""
    mine = RowStatistics.of(rows.train, rows.norms)
    every = runtime.gather_objects((mine.raw.count, mine.record()))
    validation = of_all_ranks(rows.validation, runtime)
    for (count, record), held in zip(every, validation, strict=True):
        gathered.add(RowStatistics.read(count, record), held)
    return of_all_ranks(rows.train, runtime)


def _median(norms: Tensor) -> float:
    return float(norms.median()) if len(norms) else 0.0


def _publish(
    builder: Builder,
    gathered: Gathered,
    passes: Passes,
    median: float,
    n_chunks: int,
    runtime: Runtime,
) -> None:
    chunks, counts = passes.chunks, gathered.counts
    sentences = sum(len(chunks.sentences(passes.order[i])) for i in range(n_chunks))
    if counts["train_rows"] == 0:
        raise ValueError(
            f"{chunks.corpus.artifact.path}: no row of {sentences:,} sentences is left for training "
            f"({counts['validation_rows']:,} held out); give more text, another --rows-seed, or "
            "--validation-fraction 0"
        )
    names = []
    if runtime.is_main:
        assert gathered.statistics is not None
        tensors = safetensors.torch.save(gathered.statistics.tensors())
        names.append(builder.publish("statistics.safetensors", tensors).name)
        if counts["validation_rows"]:
            rows = torch.cat(gathered.validation)
            order = torch.randperm(len(rows), generator=unit_generator(passes.seed, "held out", 0))
            content = safetensors.torch.save({"x": rows[order]})
            names.append(builder.publish(VALIDATION, content, rows=len(rows)).name)
    limit = passes.limit(median)
    found = dict(counts) | {
        "sentences": sentences,
        "rows_per_epoch": round(counts["train_rows"] * chunks.corpus.n_sentences / sentences),
    }
    norms = {"median_norm": median, "max_norm": limit if math.isfinite(limit) else None}
    builder.finish(names, found, norms)
    log.info(
        "%s: %s training rows in %s of %s sentences, %s validation rows",
        builder.path, f"{found['train_rows']:,}", f"{sentences:,}",
        f"{chunks.corpus.n_sentences:,}", f"{counts['validation_rows']:,}",
    )  # fmt: skip

"""Activations -> batches: all rows in one global random order, split by document, with exact statistics.

    python -m sae.preprocess --activations acts/ --out batches/
    torchrun --nproc_per_node=8 -m sae.preprocess --activations acts/ --out batches/ --memory 16

Pass 1 sends every row to a random bucket, pass 2 shuffles within each bucket. Bucket and order are drawn uniformly, so every
order of the rows is equally likely, and both depend on the seed and the input alone: any number of processes writes the same
bytes. Scratch files (names with a leading dot) need about the input's size on disk until the end; the input is only read.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture.store import Activations, open_activations
from core.artifact import Builder, building
from core.cli import StageConfig, run_stage
from core.runtime import Runtime
from sae.duplicates import find_repeated
from sae.scatter import Plan, norm_limit, scatter
from sae.scratch import remove_scratch
from sae.shuffle import gather, write_rest, write_statistics

log = logging.getLogger("sae.preprocess")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(StageConfig):
    """Flags of the stage."""

    activations: Path
    """Folder written by capture.activations."""
    out: Path
    """Folder to write."""
    site: str = ""
    """Which site's activations; needed only where the folder holds several."""
    memory: float = 4.0
    """GiB that one process may fill with rows. Part of the result: it decides how many buckets there are."""
    batch_rows: int = 1024
    """Rows in a batch; every file holds a whole number of batches, but for the very last rows."""
    validation_fraction: float = 0.05
    """Share of documents held out for validation, chosen by hash of document id and seed; 0: none."""
    max_norm_ratio: float = 10.0
    """Rows with a norm above this many times the median norm are dropped and counted (attention sinks); 0: keep all."""

    drop_duplicates: bool = False
    """Drop, and count, sentences with the same token ids as an earlier one, whichever document that is in: a held-out sentence
    is then none that was trained on. Costs one more reading of the activations and eight bytes a sentence."""
    median_rows: int = 0
    """Training rows whose geometric median is taken besides, for `sae.train --b-pre geometric_median`; 0: none."""

    def __post_init__(self) -> None:
        if not self.memory > 0:
            raise ValueError(f"--memory must be positive (GiB); found {self.memory}")
        if self.batch_rows < 1:
            raise ValueError(f"--batch-rows must be at least 1; found {self.batch_rows}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"--validation-fraction must be in [0, 1); found {self.validation_fraction}")
        if self.max_norm_ratio < 0:
            raise ValueError(f"--max-norm-ratio must be 0 (keep all) or positive; found {self.max_norm_ratio}")
        if self.median_rows < 0:
            raise ValueError(f"--median-rows must be 0 (no geometric median) or positive; found {self.median_rows}")


def run(config: PreprocessConfig, runtime: Runtime) -> None:
    """Write the batches folder; on a half-finished one, continue."""
    activations = open_activations(config.activations, config.site or None)
    provenance = activations.provenance | {
        "validation_fraction": config.validation_fraction,
        "split_seed": config.seed,
    }
    with building(config.out, "batches", config, runtime, [activations.artifact], provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
        else:
            counts = _build(config, activations, builder, runtime)
            log.info(
                "%s: %s training and %s validation rows in batches of %s, d_model %s; dropped: %s for their norm, %s repeated",
                config.out, *(f"{counts[name]:,}" for name in ("train_rows", "validation_rows")), config.batch_rows,
                activations.d_model, *(f"{counts[name]:,}" for name in ("abnormal_rows", "repeated_rows")),
            )  # fmt: skip
        if runtime.is_main:
            remove_scratch(config.out)


def _build(config: PreprocessConfig, activations: Activations, builder: Builder, runtime: Runtime) -> dict[str, Any]:
    """Both passes, the statistics and the manifest; returns the manifest's counts."""
    plan = make_plan(config, activations)
    repeated = find_repeated(activations, builder, runtime) if config.drop_duplicates else None
    scatter(plan, activations, repeated, builder, runtime)
    runtime.barrier()
    median, limit = norm_limit(config.out, len(activations), config.max_norm_ratio)
    names = gather(plan, limit, builder, runtime)
    runtime.barrier()
    counts = plan.counts(limit)
    if counts["train_rows"] == 0:
        raise ValueError(
            f"{config.activations}: no row is left for training ({activations.n_tokens} read, {counts['validation_rows']} held "
            f"out, {counts['abnormal_rows']} of abnormal norm, {counts['repeated_rows']} repeated); give more text, another "
            "--seed, or --validation-fraction 0"
        )
    if runtime.is_main:
        names += write_rest(plan, builder) + write_statistics(plan, config.median_rows, builder)
    builder.finish(names, counts, {"median_norm": median, "max_norm": limit if math.isfinite(limit) else None})
    return counts


def make_plan(config: PreprocessConfig, activations: Activations) -> Plan:
    """How many buckets there are. One process holds a bucket up to five times over (4.4 measured): as read, joined, shuffled,
    and as bytes; and besides some 0.15 GiB for the rows of a chunk and the histogram of norms.
    """
    row_bytes = activations.d_model * activations.chunk(0).activations.element_size()
    wanted = math.ceil(5 * activations.n_tokens * row_bytes / (config.memory * 2**30))
    train = max(1, wanted)
    # Documents are unequal, so the held-out share of the rows may exceed that of the documents.
    validation = max(1, math.ceil(2 * config.validation_fraction * train)) if config.validation_fraction else 0
    return Plan(
        folder=config.out,
        n_chunks=len(activations),
        buckets={"train": train, "validation": validation},
        batch_rows=config.batch_rows,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
    )


if __name__ == "__main__":
    run_stage(PreprocessConfig, run, __doc__ or "")

"""Pass 1 of preprocessing: every row to a random bucket; one scratch file per chunk holds its rows sorted by bucket.

Shapes: R rows of a chunk, d model width, B buckets of both splits together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from capture.store import Activations, Chunk
from core.artifact import Builder
from core.cli import progress
from core.norms import row_norms
from core.runtime import Runtime, unit_generator
from sae.scratch import bucket_name, chunk_name
from sae.split import held_out

NORM_SHIFT = 11  # a float32 norm without its 11 lowest bits: 12 bits of mantissa remain, so the median is exact to 1 in 4,096


@dataclass(frozen=True)
class Plan:
    """What both passes and all ranks agree on. Buckets of the training split come first, those of validation follow."""

    folder: Path
    n_chunks: int
    buckets: dict[str, int]
    batch_rows: int
    validation_fraction: float
    seed: int

    @property
    def n_buckets(self) -> int:
        return sum(self.buckets.values())

    def place(self, bucket: int) -> tuple[str, int]:
        """The split of a bucket and its number there."""
        n_train = self.buckets["train"]
        return ("train", bucket) if bucket < n_train else ("validation", bucket - n_train)

    def numbers(self, split: str) -> range:
        """The buckets of a split."""
        n_train = self.buckets["train"]
        return range(n_train) if split == "train" else range(n_train, self.n_buckets)

    def generator(self, purpose: str, number: int) -> torch.Generator:
        """Randomness for one unit of work, the same on whichever rank does it."""
        return unit_generator(self.seed, purpose, number)

    def counts(self, limit: float) -> dict[str, Any]:
        """Rows by split, whole and partial batches, and rows dropped, from the scratch files of both passes."""
        counts: dict[str, Any] = {"abnormal_rows": 0, "repeated_rows": sum(self._repeated_rows())}
        for split in ("train", "validation"):
            found = [bucket_rows(self.folder, bucket) for bucket in self.numbers(split)]
            rows = sum(bucket.in_file + bucket.rest for bucket in found)
            counts["abnormal_rows"] += sum(bucket.dropped for bucket in found)
            counts[f"{split}_rows"] = rows
            counts[f"{split}_batches"] = -(-rows // self.batch_rows)
            counts[f"{split}_partial_batch_rows"] = rows % self.batch_rows
        return counts

    def _repeated_rows(self) -> Iterator[int]:
        for index in range(self.n_chunks):
            with safe_open(self.folder / chunk_name(index), framework="pt") as file:
                yield int(file.get_tensor("repeated_rows"))


class BucketRows(NamedTuple):
    """What became of a bucket's rows: written in whole batches, left over, and dropped for their norm."""

    in_file: int
    rest: int
    dropped: int


def bucket_rows(folder: Path, bucket: int) -> BucketRows:
    """Read the counts of a finished bucket, not its rows."""
    with safe_open(folder / bucket_name(bucket), framework="pt") as file:
        rest = file.get_slice("rest").get_shape()[0]
        return BucketRows(int(file.get_tensor("file_rows")), rest, int(file.get_tensor("dropped")))


def scatter(plan: Plan, activations: Activations, repeated: Tensor | None, builder: Builder, runtime: Runtime) -> None:
    """Write the scratch file of each chunk of this rank that an earlier run did not finish.

    `repeated` [n_sentences] says which sentences are to be left out; None: none.
    """
    todo = [i for i in runtime.share(plan.n_chunks) if not builder.has(chunk_name(i))]
    for index in progress(todo, "scattering", len(todo), "chunks", runtime):
        chunk = activations.chunk(index)
        sorted_rows = scatter_chunk(plan, chunk, None if repeated is None else repeated[chunk.sentence_ids])
        builder.publish(chunk_name(index), safetensors.torch.save(sorted_rows))


def scatter_chunk(plan: Plan, chunk: Chunk, repeated: Tensor | None = None) -> dict[str, Tensor]:
    """`x` [R, d] sorted by bucket, `offsets` [B + 1] of the buckets in it, its norms' histogram as `bins` and `bin_counts`,
    and how many rows were left out because their sentence is `repeated` [n].

    ValueError where a row is not finite.
    """
    rows, lengths = chunk.activations, chunk.offsets.diff()
    norms = row_norms(rows)
    if not bool(torch.isfinite(norms).all()):
        row = int((~torch.isfinite(norms)).nonzero()[0])
        sentence = int(torch.searchsorted(chunk.offsets, row, right=True)) - 1
        raise ValueError(
            f"chunk {chunk.index}, row {row} (sentence {int(chunk.sentence_ids[sentence])}, document "
            f"{int(chunk.document_ids[sentence])}): holds NaN or infinite values; capture it again in bfloat16 or float32"
        )
    validation = held_out(chunk.document_ids, plan.validation_fraction, plan.seed).repeat_interleave(lengths)
    if repeated is not None:
        kept = ~repeated.repeat_interleave(lengths)
        rows, norms, validation = rows[kept], norms[kept], validation[kept]
    generator = plan.generator("chunk", chunk.index)
    draws = {
        split: torch.randint(max(1, n), (len(rows),), generator=generator) + plan.numbers(split).start
        for split, n in plan.buckets.items()
    }
    bucket = torch.where(validation, draws["validation"], draws["train"])
    order = bucket.argsort(stable=True)
    offsets = torch.zeros(plan.n_buckets + 1, dtype=torch.long)
    offsets[1:] = torch.bincount(bucket, minlength=plan.n_buckets).cumsum(0)
    bits = norms.clamp(max=torch.finfo(torch.float32).max).float().view(torch.int32)
    bins, bin_counts = torch.unique(bits >> NORM_SHIFT, return_counts=True)
    n_left_out = torch.tensor(len(chunk.activations) - len(rows))
    return {"x": rows[order], "offsets": offsets, "bins": bins, "bin_counts": bin_counts, "repeated_rows": n_left_out}


def read_bucket(plan: Plan, bucket: int) -> Tensor:
    """All rows of a bucket, in the order of the chunks."""
    parts = list[Tensor]()
    for index in range(plan.n_chunks):
        with safe_open(plan.folder / chunk_name(index), framework="pt") as file:
            start, end = file.get_slice("offsets")[bucket : bucket + 2].tolist()
            parts.append(file.get_slice("x")[start:end])
    return torch.cat(parts)


def norm_limit(folder: Path, n_chunks: int, ratio: float) -> tuple[float, float]:
    """The median norm of all rows, and the largest norm kept: `ratio` times that; infinite where either is 0."""
    counts = torch.zeros(2 ** (32 - NORM_SHIFT), dtype=torch.long)
    for index in range(n_chunks):
        with safe_open(folder / chunk_name(index), framework="pt") as file:
            counts.index_add_(0, file.get_tensor("bins").long(), file.get_tensor("bin_counts"))
    below = counts.cumsum(0)
    middle = int(torch.searchsorted(below, (int(below[-1]) + 1) // 2))
    median = float(torch.tensor(middle << NORM_SHIFT, dtype=torch.int32).view(torch.float32))
    return median, ratio * median if ratio and median else float("inf")

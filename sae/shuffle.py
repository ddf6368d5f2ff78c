"""Pass 2 of preprocessing: shuffle each bucket, write its whole batches, and take the statistics of its rows.

What does not fill a batch waits in the bucket's scratch file; the rests of all buckets form the last file of each split.
Shapes: R rows of a bucket, d model width.
"""

import math

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from core.artifact import Builder
from core.cli import progress
from core.norms import row_norms
from core.runtime import Runtime
from sae.model import SAEConfig, layer_normalised
from sae.row_statistics import RowStatistics, refuse_large
from sae.running_statistics import geometric_median
from sae.scatter import Plan, bucket_rows, read_bucket
from sae.scratch import bucket_name, read_scratch


def file_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.safetensors"


def gather(plan: Plan, limit: float, builder: Builder, runtime: Runtime) -> list[str]:
    """Finish each bucket of this rank; returns the names of the files that came out."""
    names = []
    mine = runtime.share(plan.n_buckets)
    for bucket in progress(mine, "shuffling", len(mine), "buckets", runtime):
        split, number = plan.place(bucket)
        name = file_name(split, number)
        if not builder.has(bucket_name(bucket)):
            _finish_bucket(plan, bucket, name, limit, builder)
        if builder.has(name):
            names.append(name)
    return names


def _finish_bucket(plan: Plan, bucket: int, name: str, limit: float, builder: Builder) -> None:
    """Publish the bucket's whole batches as `name`, then its scratch file, which marks it as done."""
    rows = read_bucket(plan, bucket)
    norms = row_norms(rows)
    kept = (norms <= limit).nonzero()[:, 0]
    refuse_large(norms[kept])
    order = kept[torch.randperm(len(kept), generator=plan.generator("bucket", bucket))]
    dropped = len(rows) - len(kept)
    rows = rows[order]
    whole = len(rows) // plan.batch_rows * plan.batch_rows
    if whole:
        builder.publish(name, safetensors.torch.save({"x": rows[:whole]}), rows=whole)
    record = {"rest": rows[whole:], "file_rows": torch.tensor(whole), "dropped": torch.tensor(dropped)}
    if plan.place(bucket)[0] == "train":
        record |= RowStatistics.of(rows, norms[order]).record()
    builder.publish(bucket_name(bucket), safetensors.torch.save(record))


def write_rest(plan: Plan, builder: Builder) -> list[str]:
    """The rests of all buckets, one after the other, in files no larger than the largest bucket's; only the last may end in a
    partial batch. Their rows need no further shuffle: which rows a bucket leaves over is random already."""
    names = []
    for split, n_buckets in plan.buckets.items():
        number, parts = n_buckets, list[Tensor]()
        buckets = plan.numbers(split)
        most = max((bucket_rows(plan.folder, bucket).in_file for bucket in buckets), default=0) or math.inf
        for bucket in buckets:
            parts.append(read_scratch(plan.folder, bucket_name(bucket))["rest"])
            rows = sum(map(len, parts))
            last = bucket == buckets[-1]
            if rows < most and not last:
                continue
            joined = torch.cat(parts)
            whole = rows if last else rows // plan.batch_rows * plan.batch_rows
            if whole:
                names.append(file_name(split, number))
                builder.publish(names[-1], safetensors.torch.save({"x": joined[:whole].contiguous()}), rows=whole)
            number, parts = number + 1, [joined[whole:]]
    return names


def first_rows(plan: Plan, n: int) -> Tensor:
    """The first `n` training rows of the first buckets, fewer where there are not so many: a random sample [<= n, d]."""
    parts, found = list[Tensor](), 0
    for bucket in plan.numbers("train"):
        pieces = [read_scratch(plan.folder, bucket_name(bucket))["rest"]]
        if bucket_rows(plan.folder, bucket).in_file:
            with safe_open(plan.folder / file_name("train", bucket), framework="pt") as file:
                pieces.insert(0, file.get_slice("x")[: n - found])
        parts += pieces
        found += sum(map(len, pieces))
        if found >= n:
            break
    return torch.cat(parts)[:n]


def write_statistics(plan: Plan, median_rows: int, builder: Builder) -> list[str]:
    """Merge the buckets' statistics in order, so that the result does not depend on who computed them.

    `statistics.safetensors` holds what RowStatistics.tensors says of the training rows; with `median_rows`, of so many rows,
    `geometric_median`, `dataset_geometric_median` and `layer_geometric_median` too.
    """
    whole: RowStatistics | None = None
    for bucket in plan.numbers("train"):
        record = read_scratch(plan.folder, bucket_name(bucket))
        part = RowStatistics.read(int(record["file_rows"]) + len(record["rest"]), record)
        if whole is None:
            whole = part
        else:
            whole.merge(part)
    assert whole is not None
    statistics = whole.tensors()
    if median_rows:
        rows = first_rows(plan, median_rows)
        median = geometric_median(rows)
        layer_median = geometric_median(layer_normalised(rows.float(), SAEConfig.norm_eps).z)
        statistics |= {
            "geometric_median": median,
            "dataset_geometric_median": median * whole.scale,
            "layer_geometric_median": layer_median,
        }
    builder.publish("statistics.safetensors", safetensors.torch.save(statistics))
    return ["statistics.safetensors"]

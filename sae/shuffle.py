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
from core.norms import LARGEST, SMALLEST, row_norms
from core.runtime import Runtime
from sae.batches import Statistics
from sae.model import SAEConfig, layer_normalised
from sae.running_statistics import BLOCK_ROWS, RunningStatistics, geometric_median
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
    if len(kept) and (largest := float(norms[kept].max())) > LARGEST:
        raise ValueError(
            f"activations hold a finite row of norm {largest:.3g}, whose squares float32 cannot sum up; expected norms up to "
            f"{LARGEST:g}. Drop such rows with --max-norm-ratio 10, or check the model and the site"
        )
    order = kept[torch.randperm(len(kept), generator=plan.generator("bucket", bucket))]
    dropped = len(rows) - len(kept)
    rows = rows[order]
    whole = len(rows) // plan.batch_rows * plan.batch_rows
    if whole:
        builder.publish(name, safetensors.torch.save({"x": rows[:whole]}), rows=whole)
    record = {"rest": rows[whole:], "file_rows": torch.tensor(whole), "dropped": torch.tensor(dropped)}
    if plan.place(bucket)[0] == "train":
        record |= _statistics(rows, norms[order])
    builder.publish(bucket_name(bucket), safetensors.torch.save(record))


def _statistics(rows: Tensor, norms: Tensor) -> dict[str, Tensor]:
    raw, layer = RunningStatistics.none(rows.shape[1]), RunningStatistics.none(rows.shape[1])
    for block in torch.split(rows, BLOCK_ROWS):
        raw.merge(RunningStatistics.of(block))
        layer.merge(RunningStatistics.of(layer_normalised(block.float(), SAEConfig.norm_eps).z))
    return {
        "norm_sum": norms.sum(),
        "mean": raw.mean,
        "m2": raw.m2,
        "layer_mean": layer.mean,
        "layer_m2": layer.m2,
    }


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

    `statistics.safetensors` holds, of the training rows: `count`, `mean_norm` (E||x||); float64 [d] `mean` and `variance` of
    x, `dataset_mean` and `dataset_variance` of z = x sqrt(d) / E||x||, `layer_mean` and `layer_variance` of z under `layer`;
    with `median_rows`, of so many rows, `geometric_median`, `dataset_geometric_median` and `layer_geometric_median`.
    """
    raw, layer, norm_sum = None, None, 0.0
    for bucket in plan.numbers("train"):
        record = read_scratch(plan.folder, bucket_name(bucket))
        count = int(record["file_rows"]) + len(record["rest"])
        parts = (
            RunningStatistics(count, record["mean"], record["m2"]),
            RunningStatistics(count, record["layer_mean"], record["layer_m2"]),
        )
        if raw is None or layer is None:
            raw, layer = parts
        else:
            raw.merge(parts[0])
            layer.merge(parts[1])
        norm_sum += float(record["norm_sum"])
    assert raw is not None
    assert layer is not None
    mean_norm = norm_sum / raw.count
    if 0 < mean_norm < SMALLEST:
        raise ValueError(
            f"the mean norm of the activations is {mean_norm:.3g}, whose squares float32 cannot hold; expected at least "
            f"{SMALLEST:g}. Check the model and the site"
        )
    scale = math.sqrt(len(raw.mean)) / mean_norm if mean_norm else 1.0
    statistics = {
        "count": torch.tensor(raw.count),
        "mean_norm": torch.tensor(mean_norm, dtype=torch.float64),
        "mean": raw.mean,
        "variance": raw.variance,
        "dataset_mean": raw.mean * scale,
        "dataset_variance": raw.variance * scale**2,
        "layer_mean": layer.mean,
        "layer_variance": layer.variance,
    }
    Statistics(statistics).refuse_constant("none")
    if median_rows:
        rows = first_rows(plan, median_rows)
        median = geometric_median(rows)
        layer_median = geometric_median(layer_normalised(rows.float(), SAEConfig.norm_eps).z)
        statistics |= {
            "geometric_median": median,
            "dataset_geometric_median": median * scale,
            "layer_geometric_median": layer_median,
        }
    builder.publish("statistics.safetensors", safetensors.torch.save(statistics))
    return ["statistics.safetensors"]

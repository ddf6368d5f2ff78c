"""Preprocessing: every row once and only once, exact statistics, the same bytes whoever does the work."""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from core import files
from core.artifact import open_artifact, verify
from sae.batches import Batches
from sae.preprocess import PreprocessConfig, run
from sae.running_statistics import RunningStatistics, geometric_median
from sae.split import held_out, is_held_out
from tests.faults import ForkServer
from tests.sae_folders import ALONE, SITE, make_activations

D = 6
LENGTHS = [1 + (7 * i) % 13 for i in range(60)]
SMALL = 2e-6  # GiB: forces many buckets


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """Distinct rows, in bfloat16 as capture stores them."""
    return (torch.randn(sum(LENGTHS), D, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()


@pytest.fixture
def activations(tmp_path: Path, rows: Tensor) -> Path:
    return make_activations(tmp_path / "acts", rows, LENGTHS)


def config(activations: Path, out: Path, **overrides: object) -> PreprocessConfig:
    values: dict[str, object] = {"batch_rows": 16, "memory": SMALL, "validation_fraction": 0.2, "max_norm_ratio": 0}
    return PreprocessConfig(activations=activations, out=out, **(values | overrides))  # type: ignore[arg-type]


def read(folder: Path, split: str) -> Tensor:
    names = sorted(n for n in open_artifact(folder, "batches").names if n.startswith(split))
    parts = [safetensors.torch.load_file(folder / name)["x"] for name in names]
    return torch.cat(parts) if parts else torch.empty(0, D)


def sorted_rows(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(x.float().numpy().copy().view([("", np.float32)] * x.shape[1]), axis=0).view(np.float32))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def in_validation(seed: int = 0, fraction: float = 0.2) -> Tensor:
    """Which rows of the fixture belong to held-out documents."""
    by_sentence = torch.tensor([is_held_out(i // 2, fraction, seed) for i in range(len(LENGTHS))])
    return by_sentence.repeat_interleave(torch.tensor(LENGTHS))


def test_rows_out_are_the_rows_in_and_split_by_document(activations: Path, tmp_path: Path, rows: Tensor) -> None:
    before = digests(activations)
    run(config(activations, tmp_path / "out"), ALONE)
    validation = in_validation()
    assert 0 < int(validation.sum()) < len(rows)
    for split, chosen in (("train", rows[~validation]), ("validation", rows[validation])):
        found = read(tmp_path / "out", split)
        assert found.dtype == torch.bfloat16
        assert torch.equal(sorted_rows(found), sorted_rows(chosen))
    assert digests(activations) == before


def test_files_hold_whole_batches_and_counts_are_right(activations: Path, tmp_path: Path, rows: Tensor) -> None:
    run(config(activations, tmp_path / "out"), ALONE)
    manifest = verify(tmp_path / "out")
    train = [record.rows for record in manifest.files if record.name.startswith("train")]
    assert len(train) > 3
    assert all(n % 16 == 0 for n in train[:-1])
    n_train = int((~in_validation()).sum())
    assert sum(train) == manifest.counts["train_rows"] == n_train
    assert manifest.counts["train_batches"] == math.ceil(n_train / 16)
    assert manifest.counts["train_partial_batch_rows"] == n_train % 16 == train[-1] % 16
    assert manifest.counts["validation_rows"] == len(rows) - n_train
    assert {k: manifest.provenance[k] for k in ("site", "model_hash", "bos", "split_seed", "validation_fraction")} == {
        "site": SITE, "model_hash": "m", "bos": "none", "split_seed": 0, "validation_fraction": 0.2,
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")) == []


def test_order_is_a_global_permutation(tmp_path: Path) -> None:
    """With eight buckets and one, positions in and out are unrelated, and rows of a chunk spread over the whole result."""
    n = 4000
    numbered = torch.arange(n, dtype=torch.float32)[:, None].repeat(1, 2)
    acts = make_activations(tmp_path / "acts", numbered, [10] * (n // 10), chunk_sentences=40)
    for name, memory in (("many", 4 * n * 8 / 2**30 / 8), ("one", 1.0)):
        run(config(acts, tmp_path / name, memory=memory, validation_fraction=0), ALONE)
        order = read(tmp_path / name, "train")[:, 0]
        assert abs(float(torch.corrcoef(torch.stack((order, torch.arange(n).float())))[0, 1])) < 0.06
        thirds = (order < 400).nonzero()[:, 0].float() / n  # where the first chunk's rows went
        assert float(thirds.mean()) == pytest.approx(0.5, abs=0.06)
        assert float(thirds.std()) == pytest.approx(12**-0.5, abs=0.04)
    run(config(acts, tmp_path / "other", memory=1.0, validation_fraction=0, seed=1), ALONE)
    assert not torch.equal(read(tmp_path / "one", "train"), read(tmp_path / "other", "train"))


def test_same_bytes_for_any_number_of_processes(fork_server: ForkServer, activations: Path, tmp_path: Path) -> None:
    flags = ("--batch-rows", 16, "--memory", SMALL, "--validation-fraction", 0.2, "--activations", activations, "--threads", 1)
    flags += ("--drop-duplicates", "--median-rows", 100)
    for ranks in (1, 2, 4):
        done = fork_server.ranks(ranks, "sae.preprocess", *flags, "--out", tmp_path / str(ranks))
        assert done.returncode == 0, done.stderr
    assert "training and" in done.stderr
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "4")


def test_continues_after_a_failure_at_every_stage(activations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at the N-th rename for ever larger N, each time in a folder of its own, and give the same command again."""
    every_pass: dict[str, object] = {"drop_duplicates": True, "median_rows": 50}
    run(config(activations, tmp_path / "clean", **every_pass), ALONE)
    clean = digests(tmp_path / "clean")
    for allowed in range(0, 200, 13):
        left = allowed

        def fail(operation: str, path: Path) -> None:
            nonlocal left
            left -= operation == "rename"
            if left < 0:
                raise OSError(5, "injected", str(path))

        out = tmp_path / f"faulty-{allowed}"
        monkeypatch.setattr(files, "before_operation", fail)
        try:
            run(config(activations, out, **every_pass), ALONE)
        except OSError:
            monkeypatch.undo()
            run(config(activations, out, **every_pass), ALONE)
            assert digests(out) == clean
        else:
            monkeypatch.undo()
            assert allowed > 20
            return
    raise AssertionError("never finished")


def test_finished_work_is_not_done_again(activations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(activations, tmp_path / "out"), ALONE)
    monkeypatch.setattr("sae.preprocess.scatter", None)
    run(config(activations, tmp_path / "out"), ALONE)
    with pytest.raises(ValueError, match="--batch-rows 16, now 32"):
        run(config(activations, tmp_path / "out", batch_rows=32), ALONE)


@pytest.mark.parametrize("memory", [SMALL, 1.0])
def test_statistics_equal_the_plain_ones(activations: Path, tmp_path: Path, rows: Tensor, memory: float) -> None:
    run(config(activations, tmp_path / "out", memory=memory), ALONE)
    found = safetensors.torch.load_file(tmp_path / "out" / "statistics.safetensors")
    x = rows[~in_validation()].double()
    mean_norm = x.norm(dim=1).mean()
    layer = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
    assert int(found["count"]) == len(x)
    torch.testing.assert_close(found["mean_norm"], mean_norm, rtol=1e-7, atol=0)
    for prefix, z in (("", x), ("dataset_", x * math.sqrt(D) / mean_norm), ("layer_", layer)):
        torch.testing.assert_close(found[f"{prefix}mean"], z.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found[f"{prefix}variance"], z.var(0, correction=0), rtol=1e-6, atol=1e-7)
    statistics = Batches(tmp_path / "out").statistics
    assert statistics.scale("dataset") == pytest.approx(math.sqrt(D) / float(mean_norm))
    assert statistics.total_variance("layer") == pytest.approx(float(layer.var(0, correction=0).sum()))


def test_running_statistics_keep_their_digits_far_from_zero() -> None:
    """Offset 100, noise 1, float32 rows, merged from uneven parts: as good as float64 over everything at once."""
    x = 100 + torch.randn(20_000, 5, generator=torch.Generator().manual_seed(0))
    found = RunningStatistics.none(5)
    for part in x.split([1, 9_999, 0, 5_000, 5_000]):
        found.merge(RunningStatistics.of(part))
    assert found.count == 20_000
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.variance, x.double().var(0, correction=0), rtol=1e-11, atol=0)


def test_rows_of_abnormal_norm_are_dropped_and_counted(tmp_path: Path, rows: Tensor) -> None:
    loud = rows.clone()
    loud[5::50] *= 100
    acts = make_activations(tmp_path / "acts", loud, LENGTHS)
    run(config(acts, tmp_path / "out", max_norm_ratio=10.0), ALONE)
    manifest = verify(tmp_path / "out")
    norms = loud.float().norm(dim=1)
    normal = norms <= 10 * norms.median()
    n_loud = int((~normal).sum())
    assert n_loud >= len(rows) // 60
    assert manifest.counts["abnormal_rows"] == n_loud
    assert manifest.counts["train_rows"] + manifest.counts["validation_rows"] == len(rows) - n_loud
    assert manifest.provenance["median_norm"] == pytest.approx(float(norms.median()), rel=1 / 4096)
    assert manifest.provenance["max_norm"] == pytest.approx(10 * float(norms.median()), rel=1 / 4096)
    kept = torch.cat((read(tmp_path / "out", "train"), read(tmp_path / "out", "validation")))
    assert torch.equal(sorted_rows(kept), sorted_rows(loud[normal]))


def test_repeated_sentences_are_dropped_before_the_split(tmp_path: Path, rows: Tensor) -> None:
    """Sentences 20 to 39 repeat 0 to 19, across chunks and documents; one more differs in its last token alone."""
    lengths = LENGTHS[:20] * 2 + LENGTHS[40:]
    tokens = torch.arange(sum(lengths))
    n = sum(LENGTHS[:20])
    tokens[n : 2 * n] = tokens[:n]
    tokens[2 * n - 1] += 1
    acts = make_activations(tmp_path / "acts", rows[: sum(lengths)], lengths, token_ids=tokens)
    run(config(acts, tmp_path / "all"), ALONE)
    assert verify(tmp_path / "all").counts["repeated_rows"] == 0
    run(config(acts, tmp_path / "out", drop_duplicates=True), ALONE)
    counts = verify(tmp_path / "out").counts
    kept = torch.cat((rows[:n], rows[2 * n - LENGTHS[19] : sum(lengths)]))
    assert counts["repeated_rows"] == sum(lengths) - len(kept) == n - LENGTHS[19]
    found = torch.cat((read(tmp_path / "out", "train"), read(tmp_path / "out", "validation")))
    assert torch.equal(sorted_rows(found), sorted_rows(kept))


def test_geometric_median_has_the_smallest_sum_of_distances() -> None:
    """Where it lies, the unit vectors towards the rows cancel; outliers move the mean and not it."""
    rows = torch.randn(999, 5, generator=torch.Generator().manual_seed(0))
    rows[:99] += 1000
    median = geometric_median(rows)
    towards = torch.nn.functional.normalize(rows.double() - median, dim=1)
    assert towards.mean(0).norm() < 1e-4
    assert rows.mean(0).norm() > 200
    assert (median - geometric_median(rows[99:])).norm() < 0.5
    torch.testing.assert_close(geometric_median(torch.ones(7, 3)), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("memory", [SMALL, 1.0])
def test_medians_are_those_of_the_first_training_rows(activations: Path, tmp_path: Path, memory: float) -> None:
    run(config(activations, tmp_path / "out", median_rows=50, memory=memory, batch_rows=8), ALONE)
    statistics = Batches(tmp_path / "out").statistics
    sample = torch.cat([read(tmp_path / "out", "train")])
    found = statistics.centre("none", "geometric_median")
    if memory == 1.0:  # one bucket: the sample is what stands first
        torch.testing.assert_close(found, geometric_median(sample[:50]))
    assert (found - geometric_median(sample)).norm() < 0.5
    torch.testing.assert_close(statistics.centre("dataset", "geometric_median"), found * statistics.scale("dataset"))
    x = sample[:50].float()
    layer = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
    assert (statistics.centre("layer", "geometric_median") - geometric_median(layer)).norm() < 0.5
    run(config(activations, tmp_path / "without"), ALONE)
    with pytest.raises(ValueError, match="--median-rows 32768"):
        Batches(tmp_path / "without").statistics.centre("dataset", "geometric_median")


def test_one_sentence_is_enough(tmp_path: Path) -> None:
    acts = make_activations(tmp_path / "acts", torch.eye(3, D), [3])
    run(config(acts, tmp_path / "out", batch_rows=1024, memory=4.0, validation_fraction=0.05), ALONE)
    counts = verify(tmp_path / "out").counts
    assert (counts["train_rows"], counts["train_batches"], counts["train_partial_batch_rows"]) == (3, 1, 3)
    assert len(Batches(tmp_path / "out").validation) == 0


def test_nothing_left_for_training_is_said_in_one_line(tmp_path: Path) -> None:
    acts = make_activations(tmp_path / "acts", torch.ones(3, D), [3])
    with pytest.raises(ValueError, match=r"no row is left for training \(3 read, 3 held out, 0 of abnormal norm, 0 repeated\)"):
        run(config(acts, tmp_path / "out", validation_fraction=0.999999), ALONE)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e-3, 1e15])
def test_constant_rows_are_refused(value: float, tmp_path: Path) -> None:
    acts = make_activations(tmp_path / "acts", torch.full((70, D), value), [7] * 10)
    with pytest.raises(ValueError, match="training rows are the same"):
        run(config(acts, tmp_path / "out", memory=4.0), ALONE)


def test_rows_that_differ_by_rounding_alone_are_constant(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    nearly = 1 + 2e-7 * torch.rand(70, D, generator=generator).round()
    barely = 1 + 1e-3 * torch.randn(70, D, generator=generator)
    with pytest.raises(ValueError, match="training rows are the same"):
        run(config(make_activations(tmp_path / "a", nearly, [7] * 10), tmp_path / "nearly"), ALONE)
    run(config(make_activations(tmp_path / "b", barely, [7] * 10), tmp_path / "barely"), ALONE)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("size", [1e-15, 1e-8, 1e8, 1e15])
def test_rows_of_any_size_have_the_same_statistics(size: float, flush: bool, tmp_path: Path) -> None:
    """Of z under `dataset`, on processors that take subnormal numbers for 0 too."""
    rows = 1 + torch.randn(70, D, generator=torch.Generator().manual_seed(0))
    found = []
    assert torch.set_flush_denormal(flush) or not flush
    try:
        for factor in (1.0, size):
            acts = make_activations(tmp_path / f"{factor}", rows * factor, [7] * 10)
            run(config(acts, tmp_path / f"{factor}-out", median_rows=50), ALONE)
            found.append(Batches(tmp_path / f"{factor}-out").statistics)
    finally:
        torch.set_flush_denormal(False)
    one, other = found
    assert other.scale("dataset") * size == pytest.approx(one.scale("dataset"), rel=1e-5)
    assert other.total_variance("dataset") == pytest.approx(one.total_variance("dataset"), rel=1e-5)
    for which in ("mean", "geometric_median"):
        torch.testing.assert_close(other.centre("dataset", which), one.centre("dataset", which), rtol=1e-4, atol=1e-5)


def test_rows_whose_squares_float32_cannot_hold(tmp_path: Path, rows: Tensor) -> None:
    """Few are dropped for their norm; where they are kept, or all are so, they are not called infinite."""
    few = rows.clone()
    few[5] = 3e38
    acts = make_activations(tmp_path / "few", few, LENGTHS)
    run(config(acts, tmp_path / "out", max_norm_ratio=10.0), ALONE)
    assert verify(tmp_path / "out").counts["abnormal_rows"] == 1
    with pytest.raises(ValueError, match=r"e\+38.*--max-norm-ratio") as kept:
        run(config(acts, tmp_path / "kept"), ALONE)
    acts = make_activations(tmp_path / "all", (rows.float() * 1e37), LENGTHS)
    with pytest.raises(ValueError, match=r"finite row of norm .*e\+3") as every:
        run(config(acts, tmp_path / "every", max_norm_ratio=10.0), ALONE)
    assert not any("NaN" in str(caught.value) for caught in (kept, every))
    acts = make_activations(tmp_path / "tiny", (rows.float() * 1e-20), LENGTHS)
    with pytest.raises(ValueError, match=r"mean norm .*e-20"):
        run(config(acts, tmp_path / "none"), ALONE)


def test_a_row_that_is_not_finite_is_named(tmp_path: Path, rows: Tensor) -> None:
    bad = rows.clone()
    row = sum(LENGTHS[:20]) + 2
    bad[row, 3] = float("nan")
    acts = make_activations(tmp_path / "acts", bad, LENGTHS)
    with pytest.raises(ValueError, match=r"chunk 2, row \d+ \(sentence 20, document 10\)"):
        run(config(acts, tmp_path / "out"), ALONE)


def test_split_depends_on_document_and_seed_alone() -> None:
    ids = torch.arange(20_000)
    chosen = held_out(ids, 0.05, seed=3)
    assert float(chosen.float().mean()) == pytest.approx(0.05, abs=0.006)
    assert torch.equal(held_out(ids.flip(0), 0.05, seed=3), chosen.flip(0))
    assert not torch.equal(held_out(ids, 0.05, seed=4), chosen)
    assert torch.equal(held_out([7, 7, 9], 0.05, seed=3), chosen[[7, 7, 9]])
    assert not held_out(ids, 0.0, seed=3).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"memory": 0}, "--memory"), ({"batch_rows": 0}, "--batch-rows"), ({"validation_fraction": 1}, "--validation-fraction"),
     ({"max_norm_ratio": -1}, "--max-norm-ratio"), ({"median_rows": -1}, "--median-rows")],
)  # fmt: skip
def test_flags_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(Path("a"), Path("b"), **change)


def test_memory_bounds_the_buckets(activations: Path, tmp_path: Path) -> None:
    run(config(activations, tmp_path / "out"), ALONE)
    largest = max(os.path.getsize(path) for path in (tmp_path / "out").glob("train-*"))
    assert largest < SMALL * 2**30 / 2

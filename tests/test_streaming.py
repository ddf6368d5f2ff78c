"""Training while the model runs: the rows of each step, and whole runs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from capture.activations import ActivationsConfig
from capture.activations import run as capture
from capture.sentences import SentencesConfig
from capture.sentences import run as sentences
from core.artifact import verify
from core.lines import read_lines
from core.runtime import Solo
from sae.batches import Batches, Statistics
from sae.checkpoint import complete
from sae.model import load
from sae.plan import plan
from sae.preprocess import PreprocessConfig
from sae.preprocess import run as preprocess
from sae.streaming.needs import Needs, memory
from sae.streaming.order import ChunkOrder, Windows
from sae.streaming.reader import Piece, Storage, StreamReader
from sae.streaming.supply import FromModel
from sae.train import TrainConfig, run
from sae.trainer import Trainer
from tests.conftest import ROOT
from tests.faults import ForkServer
from tests.sae_folders import ALONE
from tests.test_plan import peak_bytes
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
SITE = "layers.1.resid_post"
WORDS = [
    "the",
    "ship",
    "left",
    "harbour",
    "in",
    "a",
    "storm",
    "while",
    "old",
    "men",
    "sang",
    "about",
    "winter",
    "bread",
    "and",
    "the",
    "price",
    "of",
    "salt",
    "before",
    "rain",
    "took",
    "every",
    "lantern",
    "from",
    "their",
    "hands",
    "near",
    "seven",
    "grey",
    "hills",
]


# the order of rows ----------------------------------------------------------------------------------


class Rank(Solo):
    """One of several that share out rows, as far as a reader asks."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class NumberedRows:
    """A pump whose rows say where in the stream they stand; chunk i has `sizes[i % len(sizes)]`."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.readers = sizes, dict[str, StreamReader]()
        self.next, self.fetched = 0, list[int]()
        self.most_pending = 0

    def seek(self, site: str, ordinal: int) -> None:
        self.next = ordinal

    def fetch(self, site: str) -> None:
        before = sum(self.size(i) for i in range(self.next))
        x = torch.arange(before, before + self.size(self.next)).double()[:, None]
        self.fetched.append(self.next)
        self.readers[site].give(Piece(self.next, x))
        self.most_pending = max(self.most_pending, self.readers[site].surplus)
        self.next += 1

    def size(self, ordinal: int) -> int:
        return self.sizes[ordinal % len(self.sizes)]


def numbered(windows: Windows, sizes: list[int], rank: int = 0, size: int = 1) -> StreamReader:
    pump = NumberedRows(sizes)
    storage = Storage(1, torch.float64, CPU, on_host=False)
    reader = StreamReader("s", pump, windows, Rank(rank, size), storage)
    pump.readers["s"] = reader
    return reader


def obvious(windows: Windows) -> list[list[int]]:
    """Every window shuffled as a whole, step by step."""
    steps = []
    for window in range(-(-windows.n_steps // windows.window_steps)):
        n = windows.rows(window)
        whole = windows.of_rank(window, 0, 1)
        order = (whole.arrivals[whole.drawn] + window * windows.rows(0)).tolist()
        assert sorted(order) == list(range(window * windows.rows(0), window * windows.rows(0) + n))
        steps += [order[i : i + windows.batch_size] for i in range(0, n, windows.batch_size)]
    return steps


SIZES = [[5], [1], [0, 13, 7, 0], [40], [9, 100, 2]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("batch_size", "n_steps", "buffer_rows"), [(6, 20, 30), (6, 20, 6), (7, 5, 1000), (6, 11, 47)])
def test_any_number_of_ranks_takes_the_rows_of_shuffled_windows(
    sizes: list[int], batch_size: int, n_steps: int, buffer_rows: int
) -> None:
    windows = Windows.holding(buffer_rows, batch_size, n_steps, seed=3)
    assert windows.rows(0) <= buffer_rows
    expected = obvious(windows)
    assert len(expected) == n_steps
    for size in (1, 2, 3, 7):
        readers = [numbered(windows, sizes, rank, size) for rank in range(size)]
        for step in range(n_steps):
            parts = [reader.take(step)[:, 0].long().tolist() for reader in readers]
            assert list(chain.from_iterable(parts)) == expected[step], (size, step)
        assert all(reader.done for reader in readers)
        pumps = [reader._pump for reader in readers]
        assert all(pump.fetched == pumps[0].fetched for pump in pumps)  # type: ignore[attr-defined]
        n_rows, fetched = windows.batch_size * n_steps, pumps[0].fetched  # type: ignore[attr-defined]
        assert sum(map(pumps[0].size, fetched[:-1])) < n_rows  # type: ignore[attr-defined]
        assert pumps[0].most_pending <= max(sizes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_reader_goes_on_from_any_step(sizes: list[int]) -> None:
    """From the chunks of one window, and the rows that came behind them: nothing older."""
    windows = Windows.holding(30, 6, 23, seed=1)
    whole = numbered(windows, sizes)
    rows, positions = [], []
    for step in range(23):
        positions.append(whole.position(step))
        rows.append(whole.take(step))
    for step, position in enumerate(positions):
        for rank, size in ((0, 1), (1, 2)):
            reader = numbered(windows, sizes, rank, size)
            reader.seek(step, position)
            mine = windows.share(rank, size)
            for later in range(step, 23):
                assert {name: int(x) for name, x in reader.position(later).items()} == {
                    name: int(x) for name, x in positions[later].items()
                }
                assert torch.equal(reader.take(later), rows[later][mine])
            assert reader._pump.fetched[0] == int(position["stream.ordinal"])  # type: ignore[attr-defined]


def test_chunks_come_once_an_epoch_in_a_new_order() -> None:
    order = ChunkOrder(50, seed=0)
    first, second = ([order[i] for i in range(start, start + 50)] for start in (0, 50))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert [order[i] for i in range(50)] == first
    assert [ChunkOrder(50, seed=1)[i] for i in range(50)] != first


def test_a_buffer_that_holds_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--buffer-rows 10.*--batch-size 16"):
        Windows.holding(10, 16, 5, seed=0)


# whole runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `corpus`, and `acts` and `batches` of the same rows."""
    folder = tmp_path_factory.mktemp("house")
    tiny_llama(folder / "model")
    chooser, texts = random.Random(0), folder / "texts"
    texts.mkdir()
    for number in range(40):
        lines = [f"{' '.join(chooser.choices(WORDS, k=chooser.randint(4, 14)))}." for _ in range(6)]
        (texts / f"{number:03d}.txt").write_text(" ".join(line.capitalize() for line in lines))
    sentences(SentencesConfig(source=str(texts), out=folder / "corpus"), ALONE)
    flags: dict[str, Any] = {"chunk_sentences": 16, "batch_tokens": 256, "max_length": 60}
    capture(
        ActivationsConfig(
            model=str(folder / "model"),
            corpus=folder / "corpus",
            out=folder / "acts",
            sites=(SITE,),
            storage="fp32",
            **flags,
        ),
        ALONE,
    )
    preprocess(
        PreprocessConfig(activations=folder / "acts", out=folder / "batches", batch_rows=64),
        ALONE,
    )
    return folder


SMALL: dict[str, Any] = {
    "n_latents": 96,
    "k": 4,
    "batch_size": 64,
    "lr": 3e-3,
    "dead_after_tokens": 400,
    "aux_k": 8,
    "wandb": "off",
    "log_every": 1,
    "checkpoint_every": 3,
}
STREAM: dict[str, Any] = {
    "site": SITE,
    "storage": "fp32",
    "chunk_sentences": 16,
    "batch_tokens": 256,
    "max_length": 60,
    "buffer_rows": 400,
    "statistics_sentences": 60,
    "validation_fraction": 0.1,
}


def config(house: Path, out: Path, **overrides: Any) -> TrainConfig:
    values = {"model": str(house / "model"), "corpus": house / "corpus", "out": out}
    return TrainConfig(**values | SMALL | STREAM | overrides)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    timed = ("activations_per_s", "floor_share")
    lines = read_lines(out / "metrics.jsonl", "").records
    return [{name: v for name, v in line.items() if name not in timed} for line in lines]


def contents(out: Path) -> dict[str, bytes]:
    """The SAE and the last checkpoint, with its moments."""
    last = sorted((out / "checkpoints").iterdir())[-1]
    found = [*(out / "sae").iterdir(), *last.iterdir()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def clean(house: Path) -> Path:
    out = house / "clean"
    run(config(house, out), ALONE)
    return out


def finish_run(house: str, out: str) -> None:
    """For the fork server."""
    run(config(Path(house), Path(out)), ALONE)


def test_a_run_leaves_what_later_stages_need(house: Path, clean: Path) -> None:
    manifest, sample = verify(clean / "sae"), verify(clean / "sample" / SITE)
    sae = load(clean / "sae")
    stored = verify(house / "acts").provenance
    for name in (
        "model", "model_hash", "tokenizer_hash", "dtype", "bos", "max_length", "chunk_sentences",
        "batch_tokens", "max_padding", "corpus_hash",
    ):  # fmt: skip
        assert sae.cfg.provenance[name] == manifest.provenance[name] == stored[name], name
    assert sae.cfg.provenance["site"] == SITE
    assert sae.cfg.provenance["sites"] == [SITE]
    assert sae.cfg.provenance["split_seed"] == 0
    assert sae.cfg.provenance["validation_fraction"] == 0.1
    assert sae.cfg.provenance["sample_hash"] == sample.hash
    assert [part["kind"] for part in manifest.inputs] == ["corpus"]
    assert sample.counts["sentences"] == 64
    lines = read_metrics(clean)
    assert lines[-1]["tokens"] == 64 * manifest.counts["steps"]
    assert lines[-1]["val_fvu"] < lines[0]["fvu"]
    kinds = {json.loads(path.read_text())["kind"] for path in clean.rglob("manifest.json")}
    assert kinds == {"sae", "checkpoint", "sample"}


def test_rows_are_those_that_capture_stores(house: Path, tmp_path: Path) -> None:
    """In one window of the whole corpus, an epoch takes the rows of sae.preprocess, bit for bit."""
    flags = {"statistics_sentences": 10**6, "buffer_rows": 10**6, "validation_fraction": 0.05}
    settings = config(house, tmp_path / "run", batch_size=1, k=1, n_latents=2, **flags)
    supply = FromModel(settings, ALONE)
    source = supply.sources([supply.settled(settings)], tmp_path)[SITE]
    reader = source.reader(settings, Solo(), CPU)
    stored = Batches(house / "batches")
    assert reader.total_steps == len(stored.train) == source.rows_per_epoch
    rows = torch.cat([reader.take(step) for step in range(reader.total_steps)])
    assert torch.equal(by_value(rows), by_value(stored.train.read(0, len(stored.train))))
    held = stored.validation
    mine = source.validation.read(0, len(source.validation))
    assert torch.equal(by_value(mine), by_value(held.read(0, len(held))))
    for norm in ("dataset", "layer", "none"):
        exact = stored.statistics
        assert source.statistics.scale(norm) == pytest.approx(exact.scale(norm), rel=1e-12)
        torch.testing.assert_close(source.statistics.centre(norm), exact.centre(norm), rtol=1e-10, atol=1e-12)
        assert source.statistics.total_variance(norm) == pytest.approx(exact.total_variance(norm))


def by_value(rows: Tensor) -> Tensor:
    """Rows in an order of their own, to compare sets of them."""
    return rows[torch.tensor(sorted(range(len(rows)), key=lambda i: rows[i].tolist()))]


def test_a_sample_comes_close(house: Path, clean: Path) -> None:
    """The error falls with the root of the sample's rows n: of the centre about spread / sqrt(n)."""
    part = Statistics(safetensors.torch.load_file(clean / "sample" / SITE / "statistics.safetensors"))
    exact = Batches(house / "batches").statistics
    assert part.count < 0.4 * exact.count
    assert part.scale("dataset") == pytest.approx(exact.scale("dataset"), rel=0.02)
    off = (part.centre("dataset") - exact.centre("dataset")).norm()
    assert off < 4 * (exact.total_variance("dataset") / part.count) ** 0.5


def test_continues_to_the_bit_after_an_interruption_at_any_step(
    house: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step
    n_steps = len(read_metrics(clean))
    assert n_steps > 20  # several windows
    for moment in (0, 2, 5, 6, 7, 13, n_steps - 1):
        out = tmp_path / f"cut-{moment}"

        def cut(trainer: Trainer, *wishes: Any, moment: int = moment) -> Any:
            if trainer.step == moment:
                raise RuntimeError("cut")
            return step(trainer, *wishes)

        monkeypatch.setattr(Trainer, "train_step", cut)
        with pytest.raises(RuntimeError, match="cut"):
            run(config(house, out), ALONE)
        monkeypatch.setattr(Trainer, "train_step", step)
        run(config(house, out), ALONE)
        assert contents(out) == contents(clean)
        assert read_metrics(out) == read_metrics(clean)


@pytest.mark.parametrize("n_kills", [2, pytest.param(20, marks=pytest.mark.faults)])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    house: Path, clean: Path, memory_path: Path, fork_server: ForkServer, n_kills: int
) -> None:
    assert fork_server.run(finish_run, house, memory_path / "first") == 0  # imports
    began = time.monotonic()
    assert fork_server.run(finish_run, house, memory_path / "again") == 0
    seconds = time.monotonic() - began
    moments, landed, folders = random.Random(0), 0, 0
    while landed < n_kills:
        out, status = memory_path / str(folders), -9
        while status == -9:
            after = moments.uniform(0.05, 0.95) * seconds
            status = fork_server.run(finish_run, house, out, kill_after=after)
            landed += status == -9
        assert status == 0
        assert contents(out) == contents(clean)
        folders += 1
        assert folders <= 3 * n_kills, "the runs end before they are killed"


def test_killed_at_file_operations_it_ends_with_the_same_bytes(
    house: Path, clean: Path, memory_path: Path, fork_server: ForkServer
) -> None:
    for n in (2, 17, 31, 60):
        out = memory_path / str(n)
        assert fork_server.run(finish_run, house, out, exit_at=n) == 9
        assert fork_server.run(finish_run, house, out) == 0
        assert contents(out) == contents(clean)


def test_sigterm_saves_the_current_step(house: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def interrupted(trainer: Trainer, *wishes: Any) -> Any:
        if trainer.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *wishes)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(SystemExit):
        run(config(house, tmp_path / "run", checkpoint_every=0), ALONE)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert [path.name for path in complete(tmp_path / "run" / "checkpoints", True)] == ["step-00000009"]
    run(config(house, tmp_path / "run", checkpoint_every=0), ALONE)
    assert (tmp_path / "run/sae/sae.safetensors").read_bytes() == (clean / "sae/sae.safetensors").read_bytes()


def test_it_learns_as_much_as_from_batches(house: Path, tmp_path: Path) -> None:
    """Equal rows and steps, three seeds: FVU on the held-out rows of the whole corpus."""
    flags: dict[str, Any] = {"validation_fraction": 0.05, "checkpoint_every": 0}
    flags |= {"statistics_sentences": 120, "buffer_rows": 4000}
    held = Batches(house / "batches").validation
    x = held.read(0, len(held))
    fvus: dict[str, list[float]] = {"batches": [], "model": []}
    for seed in range(3):
        shared: dict[str, Any] = {"epochs": 4, "max_steps": 150, "seed": seed, "rows_seed": 0}
        run(config(house, tmp_path / f"m{seed}", **flags, **shared), ALONE)
        settings = SMALL | shared | {"checkpoint_every": 0}
        out = tmp_path / f"b{seed}"
        run(TrainConfig(batches=house / "batches", out=out, **settings), ALONE)
        for kind, folder in (("model", f"m{seed}"), ("batches", f"b{seed}")):
            sae = load(tmp_path / folder / "sae")
            with torch.no_grad():
                error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
            fvus[kind].append(float(error))
    means = {kind: sum(values) / 3 for kind, values in fvus.items()}
    assert means["model"] == pytest.approx(means["batches"], rel=0.01), fvus


# ranks, plans, modules --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.faults)])
def test_any_number_of_ranks_gives_what_one_gives(fork_server: ForkServer, house: Path, tmp_path: Path, ranks: int) -> None:
    """The same rows to the bit in every step; in float64 the same SAE, rows or latents shared out."""
    alone = tmp_path / "alone"
    taken: list[Tensor] = []
    take = StreamReader.take

    def noted(reader: StreamReader, step: int) -> Tensor:
        taken.append(take(reader, step))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamReader, "take", noted)
        run(config(house, alone, dtype="float64"), ALONE)
    done = fork_server.ranks(ranks, "tests.stream_ranks", house, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rows/rows.bin").read_bytes() == torch.stack(taken).numpy().tobytes()
    run(config(house, tmp_path / "stopped", dtype="float64", checkpoint_every=0), ALONE)
    expected = load(alone / "sae", dtype=torch.float64)
    lines = read_metrics(alone)
    for name in ("rows", "latents", "stopped"):
        found = load(tmp_path / name / "sae", dtype=torch.float64)
        for parameter, tensor in expected.named_parameters():
            other = found.get_parameter(parameter)
            torch.testing.assert_close(other, tensor, rtol=1e-9, atol=1e-11)
        for mine, theirs in zip(read_metrics(tmp_path / name), lines, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        mine, theirs = read_metrics(tmp_path / name)[-1], lines[-1]
        assert mine["val_fvu"] == pytest.approx(theirs["val_fvu"], rel=1e-9)


def test_memory_is_within_a_tenth_of_the_plan(house: Path, tmp_path: Path) -> None:
    """Buffer, SAE, sample and forward pass, as PyTorch's CPU allocator gives them out."""
    settings = config(
        house,
        tmp_path / "run",
        buffer_rows=3000,
        batch_size=512,
        n_latents=4096,
        epochs=3,
        checkpoint_every=0,
        log_every=100,
    )
    supply = FromModel(settings, ALONE)
    one = supply.settled(settings)
    needs = Needs(supply.passes)
    alone = plan(one, supply.amount(SITE), ALONE, 1, tmp_path, 2).memory
    predicted = memory(alone, one, [one], needs, ALONE)
    model = needs.model_bytes  # read from the file as it is: no tensor of the allocator's
    measured = peak_bytes(lambda: run(settings, ALONE))
    assert sum(predicted) - model == pytest.approx(measured, rel=0.1)


def test_a_plan_says_which_way_is_cheaper(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("capture.plan.PROBE_S", 0.1)
    out = tmp_path / "run"
    monkeypatch.setattr("sae.streaming.needs.disk_bytes_per_s", lambda folder: 1.0)
    run(config(house, out, plan=True), ALONE)
    assert "cheaper this way" in capsys.readouterr().out
    monkeypatch.setattr("sae.streaming.needs.disk_bytes_per_s", lambda folder: 1e15)
    run(config(house, out, plan=True, epochs=1000), ALONE)
    assert "cheaper capture and batches" in capsys.readouterr().out
    assert not out.exists()


def test_training_from_batches_loads_no_model(house: Path, tmp_path: Path) -> None:
    """Nothing of llama3, and of capture nothing beyond the store; a run with a model does."""
    code = (
        "import sys; from pathlib import Path; from sae.train import TrainConfig, run; "
        "from tests.sae_folders import ALONE; "
        f"run(TrainConfig(batches=Path({str(house / 'batches')!r}), out=Path({str(tmp_path / 'a')!r}), "
        "n_latents=32, k=2, batch_size=64, max_steps=2, wandb='off'), ALONE); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = [name for name in done.stdout.split() if name.split(".")[0] in ("llama3", "capture")]
    # What makes the test's own folders imports the store.
    assert set(loaded) <= {"capture", "capture.store", "capture.storage", "capture.tensorfile"}


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"site": "layers.9.resid_post"}, "layers.9.resid_post"),
        ({"max_length": 4000}, "--max-length 4000"),
        ({"buffer_rows": 63}, "--buffer-rows 63.*--batch-size 64"),
        ({"batch_size": 100_000, "buffer_rows": 100_000}, "--batch-size 100,000"),
    ],
)
def test_what_cannot_be_is_named_before_training(house: Path, tmp_path: Path, flags: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        run(config(house, tmp_path / "run", **flags), ALONE)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({}, "--batches, or --model and --corpus"),
        ({"model": "demo"}, "--batches, or --model and --corpus"),
        ({"batches": Path("b"), "model": "demo"}, "not both"),
        ({"batches": Path("b"), "statistics_sentences": 0}, "--statistics-sentences 0"),
        ({"batches": Path("b"), "validation_fraction": 1.0}, r"--validation-fraction 1\.0"),
        ({"batches": Path("b"), "max_norm_ratio": -1.0}, r"--max-norm-ratio -1\.0"),
    ],
)
def test_flags_that_cannot_go_together_are_refused(flags: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        TrainConfig(out=Path("run"), **flags)


def test_a_document_of_nothing_but_held_out_rows_is_refused(house: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"validation_fraction": 0.999999, "statistics_sentences": 1}
    with pytest.raises(ValueError, match="no row of 16 sentences is left for training"):
        run(config(house, tmp_path / "run", **flags), ALONE)

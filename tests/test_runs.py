"""Several SAEs from one pass: each as if trained alone, with batches on disk and while the model runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from capture.chunks import start_chunk
from sae.grid import read_runs
from sae.model import load
from sae.streaming import feeder
from sae.streaming.feeder import Feeder
from sae.train import TrainConfig, run
from sae.trainer import Trainer
from tests.sae_folders import ALONE
from tests.test_streaming import SITE, SMALL, config, contents, house, read_metrics

__all__ = ["house"]

OTHER = "embed"
GRID = """
[grid]
architecture = ["topk", "batchtopk"]
seed = [0, 1]

[[run]]
name = "wide"
n_latents = 128
k = 8
lr = 1e-2
"""
SITES = f"""
[grid]
site = ["{SITE}", "{OTHER}"]
norm = ["dataset", "none"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def from_batches(house: Path, out: Path, **overrides: Any) -> TrainConfig:
    return TrainConfig(**{"batches": house / "batches", "out": out} | SMALL | overrides)


def same_as_alone(together: list[TrainConfig], alone: Path) -> None:
    """Folder by folder: SAE with its manifest, checkpoints and metrics."""
    for one in together:
        out = alone / one.out.name
        run(TrainConfig(**vars(one) | {"out": out}), ALONE)
        assert contents(out) == contents(one.out), one.out.name
        assert read_metrics(out) == read_metrics(one.out)


@pytest.mark.parametrize("epochs", [1, 2])
def test_runs_from_batches_equal_those_trained_alone(house: Path, tmp_path: Path, epochs: int) -> None:
    settings = from_batches(house, tmp_path / "runs", runs=write(tmp_path, GRID), epochs=epochs, max_steps=20)
    run(settings, ALONE)
    together = read_runs(settings, tmp_path / "grid.toml")
    names = [one.out.name for one in together]
    assert names == ["topk-seed0", "topk-seed1", "batchtopk-seed0", "batchtopk-seed1", "wide"]
    assert load(tmp_path / "runs/wide/sae").cfg.n_latents == 128
    same_as_alone(together, tmp_path / "alone")


def test_runs_while_the_model_runs_equal_those_trained_alone(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites from one forward pass, one of which leaves out rows that the other keeps."""
    passes: list[tuple[str, ...]] = []

    def counted(how: Any, *arguments: Any, **flags: Any) -> Any:
        passes.append(tuple(how.sites))
        return start_chunk(how, *arguments, **flags)

    monkeypatch.setattr(feeder, "start_chunk", counted)
    flags = {"max_norm_ratio": 1.1, "max_steps": 20}
    settings = config(house, tmp_path / "runs", runs=write(tmp_path, SITES), site="", **flags)
    run(settings, ALONE)
    joint = passes.count((SITE, OTHER))
    assert set(passes[:joint]) == {(SITE, OTHER)}  # behind them, one site needs no more rows
    assert joint > 0.7 * len(passes)
    together = read_runs(settings, tmp_path / "grid.toml")
    counts = [json.loads((tmp_path / "runs/sample" / site / "manifest.json").read_text())["counts"] for site in (SITE, OTHER)]
    assert counts[0]["train_rows"] != counts[1]["train_rows"]
    n_passes = len(passes)
    same_as_alone([together[0], together[2]], tmp_path / "alone")
    assert n_passes < 0.7 * len(passes[n_passes:])


def test_sites_that_drift_apart_take_passes_of_their_own(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(
        house,
        tmp_path / "runs",
        runs=write(tmp_path, SITES),
        site="",
        max_norm_ratio=1.1,
        max_steps=20,
    )
    made = Feeder.__init__
    surplus: list[int] = []

    def strict(self: Feeder, passes: Any, runtime: Any, sites: Any, most: int) -> None:
        made(self, passes, runtime, sites, 0)

    fetch = Feeder.fetch

    def watched(self: Feeder, site: str) -> None:
        fetch(self, site)
        surplus.extend(reader.surplus for reader in self.readers.values())

    monkeypatch.setattr(Feeder, "__init__", strict)
    monkeypatch.setattr(Feeder, "fetch", watched)
    run(settings, ALONE)
    monkeypatch.undo()
    assert 0 < max(surplus) <= 16 * 60  # a chunk of the longest sentences
    same_as_alone(read_runs(settings, tmp_path / "grid.toml")[:1], tmp_path / "alone")


@pytest.mark.parametrize("streaming", [False, True])
def test_runs_that_were_cut_at_different_steps_end_with_the_same_bytes(
    house: Path, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SITES if streaming else GRID
    make = config if streaming else from_batches
    site = {"site": ""} if streaming else {}
    grid = write(tmp_path, text)
    clean = make(house, tmp_path / "clean", runs=grid, max_steps=20, **site)
    run(clean, ALONE)
    step, calls = Trainer.train_step, 0

    def cut(trainer: Trainer, *wishes: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 53:  # in the middle of a step of all runs
            raise RuntimeError("cut")
        return step(trainer, *wishes)

    monkeypatch.setattr(Trainer, "train_step", cut)
    settings = make(house, tmp_path / "cut", runs=grid, max_steps=20, **site)
    with pytest.raises(RuntimeError, match="cut"):
        run(settings, ALONE)
    monkeypatch.undo()
    together = read_runs(settings, grid)
    # As a kill between two checkpoints, and before the first, leaves them.
    newest = sorted((together[0].out / "checkpoints").iterdir())
    shutil.rmtree(newest[-1])
    shutil.rmtree(together[1].out / "checkpoints")
    run(settings, ALONE)
    for one in together:
        assert contents(one.out) == contents(tmp_path / "clean" / one.out.name), one.out.name


def test_a_finished_grid_is_left_alone_and_a_table_and_curves_are_there(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = from_batches(house, tmp_path / "runs", runs=write(tmp_path, GRID), max_steps=5, validate_every=2)
    run(settings, ALONE)
    table = capsys.readouterr().out
    assert (tmp_path / "runs/results.md").read_text() in table
    records = json.loads((tmp_path / "runs/results.json").read_text())
    assert [record["run"] for record in records][-1] == "wide"
    assert records[-1]["n_latents"] == 128
    for record in records:
        last = read_metrics(tmp_path / "runs" / record["run"])[-1]
        assert record["val_fvu"] == last["val_fvu"]
        assert record["step"] == 5
        assert record["run"] in table
    page = (tmp_path / "runs/training.html").read_text()
    assert page.count("<svg") == 4
    assert "wide" in page
    before = contents(tmp_path / "runs/wide")
    for name in ("results.md", "results.json", "training.html"):
        (tmp_path / "runs" / f".{name}.0a1b2c3d.tmp").write_text("left by a kill")
    run(settings, ALONE)
    assert contents(tmp_path / "runs/wide") == before
    assert not list((tmp_path / "runs").glob("*.tmp"))


def test_a_run_that_diverges_does_not_stop_the_others(house: Path, tmp_path: Path) -> None:
    grid = write(tmp_path, "[grid]\nlr = [1e-3, 1e30]\n")
    with pytest.raises(ValueError, match=r"lr1e\+30.*must be finite"):
        run(from_batches(house, tmp_path / "runs", runs=grid, max_steps=8), ALONE)
    assert load(tmp_path / "runs/lr0.001/sae").cfg.provenance["training_steps"] == 8
    assert not (tmp_path / "runs/lr1e+30/sae/sae.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[grid]\nbatch_size = [1, 2]", "'batch_size' decides the rows"),
        ("[grid]\nwidth = [1]", "unknown name 'width'"),
        ("[grid]\nk = ['many']", "run kmany:.*many"),
        ("[grid]\narchitecture = ['deep']", "run deep:.*deep"),
        ("[grid]\nk = [1000]", "run k1000: --k .*1000"),
        ("[[run]]\nk = 1\n[[run]]\nk = 1", "two runs are called 'k1'"),
        ("[[run]]\nname = '../x'\nk = 1", r"'\.\./x' cannot be a folder's name"),
        ("k = 1", "unknown table 'k'"),
        ("", "no run"),
        ("[grid", "not valid TOML"),
        ("k = " + "[" * 100_000, "nested"),
    ],
)
def test_what_a_file_of_runs_should_not_hold_is_named(house: Path, tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ValueError, match=found) as refused:
        read_runs(from_batches(house, tmp_path), write(tmp_path, text))
    assert str(tmp_path / "grid.toml") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_of_runs_may_begin_with_a_byte_order_mark(house: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_bytes(b"\xef\xbb\xbf[grid]\nk = [1, 2]\n")
    assert [one.k for one in read_runs(from_batches(house, tmp_path), tmp_path / "grid.toml")] == [1, 2]
    (tmp_path / "grid.toml").write_bytes(b"[grid]\nk = [1, 2] # \xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_runs(from_batches(house, tmp_path), tmp_path / "grid.toml")

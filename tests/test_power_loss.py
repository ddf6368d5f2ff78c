"""A power cut at any file operation: what was said to be on disk is, nothing is half there, the same command completes it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from core import files
from core.lines import LineWriter, read_lines
from sae.metrics import Metrics
from tests.power_loss import PowerLoss, Tree, lay_out
from tests.test_core_artifact import build, check_state, snapshot


def states_of(root: Path, act: Callable[[], object]) -> tuple[list[Tree], list[Tree]]:
    """What a power cut may leave of `root` during `act`, and after it has returned."""
    files.before_operation = loss = PowerLoss(root)
    act()
    last = loss.end()
    files.before_operation = lambda operation, path: None
    return list(loss.states.values()), last


def check_all(states: list[Tree], clean: dict[str, bytes], place: Path) -> list[bool]:
    """Which of the trees read as the whole artifact; the others are refused, and the same command completes every one."""
    found = []
    for tree in states:
        folder = lay_out(tree, place) / "out"
        folder.mkdir(exist_ok=True)
        found.append(check_state(folder, clean))
        build(folder)
        assert snapshot(folder) == clean
        shutil.rmtree(place)
    return found


def test_an_artifact(memory_path: Path) -> None:
    root = memory_path / "whole"
    states, last = states_of(root, lambda: build(root / "out"))
    clean = snapshot(root / "out")
    assert len(states) > 40
    assert check_all(states, clean, memory_path / "cut").count(True) < len(states) / 2
    assert all(check_all(last, clean, memory_path / "cut")), "what `finish` returned from is there"


@pytest.mark.parametrize("missing", ["fsync", "fsync_folder"])
def test_the_shim_sees_what_is_not_synced(memory_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Without the one, files are torn under their final names; without the other, they are lost after `finish` has returned."""
    root = memory_path / "whole"
    do = files._do
    monkeypatch.setattr(files, "_do", lambda name, path, act: None if name == missing else do(name, path, act))
    _, last = states_of(root, lambda: build(root / "out"))
    clean = snapshot(root / "out")
    assert not all(tree == {f"out/{name}": content for name, content in clean.items()} for tree in last)


def killed_at(n: int, loss: PowerLoss, act: Callable[[], object]) -> bool:
    """Run `act` up to its n-th operation, behind which none happens any more. Whether it has so many."""
    count = 0

    def hook(name: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count >= n:
            raise KeyboardInterrupt
        loss(name, path)

    files.before_operation = hook
    try:
        act()
    except KeyboardInterrupt:
        return True
    return False


def test_an_artifact_that_a_second_process_completes(memory_path: Path) -> None:
    """The first is killed at every operation, so that what it had not synced the second finds there, and takes for done."""
    build(memory_path / "clean")
    clean = snapshot(memory_path / "clean")
    for n in range(1, 100):
        root = memory_path / str(n)
        loss = PowerLoss(root)
        more = killed_at(n, loss, lambda root=root: build(root / "out"))  # type: ignore[misc]
        files.before_operation = loss
        build(root / "out")
        last = loss.end()
        files.before_operation = lambda operation, path: None
        assert all(check_all(last, clean, memory_path / "cut")), f"killed at operation {n}"
        if not more:
            break
    assert n > 40


def test_lines(memory_path: Path) -> None:
    """What `write` returned from survives, whoever wrote the lines before and was killed; the last is there or is not."""
    written = [{"n": n, "text": "x" * 37 * n} for n in range(3)]
    for n in range(1, 40):
        root = memory_path / str(n)
        root.mkdir()
        path, loss = root / "journal.jsonl", PowerLoss(root)

        def write(path: Path = path) -> None:
            LineWriter(path, "").write(written[len(read_lines(path, "").records)])

        more = killed_at(n, loss, lambda write=write: [write(), write()])  # type: ignore[misc]
        files.before_operation = loss
        write()
        last = loss.end()
        files.before_operation = lambda operation, path: None
        here = len(read_lines(path, "").records)
        for number, tree in enumerate([*loss.states.values(), *last]):
            found = LineWriter(lay_out(tree, memory_path / f"{n}-{number}") / path.name, "")
            assert found.records == written[: len(found.records)]
            if number >= len(loss.states):
                assert len(found.records) == here
            found.write({"n": "next"})
            assert read_lines(found.path, "").records == [*found.records, {"n": "next"}]
        if not more:
            break
    assert n > 8


def test_metrics_of_a_run(memory_path: Path) -> None:
    root = memory_path / "whole"
    root.mkdir()

    def two_runs() -> None:
        for resumed in (0, 1):
            metrics = Metrics(root / "metrics.jsonl", resumed)
            for step in range(resumed + 1, 4):
                metrics.write({"step": step})

    for number, tree in enumerate(states_of(root, two_runs)[0]):
        folder = lay_out(tree, memory_path / str(number))
        Metrics(folder / "metrics.jsonl", 10)
        steps = [line["step"] for line in read_lines(folder / "metrics.jsonl", "").records]
        assert steps == list(range(1, len(steps) + 1))
        assert [p.name for p in folder.iterdir()] == ["metrics.jsonl"], "no temporary of the dead run stays"

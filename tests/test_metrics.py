"""sae/metrics.py: what an earlier run wrote is continued as it was, or refused."""

import json
from pathlib import Path

import pytest

from interpretability.report import read_curves
from sae.metrics import Metrics

LINES = [{"step": step, "tokens": 10 * step, "loss": 1 / step, "fvu": 0.5, "dead_fraction": 0.0} for step in (1, 2, 3)]


def written(path: Path) -> bytes:
    metrics = Metrics(path, 0)
    for line in LINES:
        metrics.write(line)
    return path.read_bytes()


def test_other_tools_find_the_same_keys_and_one_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    found = [json.loads(line) for line in written(path).splitlines()]
    assert [list(line) for line in found] == [[*LINES[0], "xxh3"]] * 3
    assert [{name: line[name] for name in LINES[0]} for line in found] == LINES
    assert read_curves(path)["loss"] == [[10, 1.0], [20, 0.5], [30, 0.3333]]


def test_no_single_bit_is_carried_on_or_shown(memory_path: Path) -> None:
    path = memory_path / "metrics.jsonl"
    whole = written(path)
    for place in range(0, 8 * len(whole), 3):
        path.write_bytes(whole[: place // 8] + bytes([whole[place // 8] ^ 1 << place % 8]) + whole[place // 8 + 1 :])
        with pytest.raises(ValueError, match=r"metrics\.jsonl: line \d does not fit its checksum.*rename it"):
            Metrics(path, 3)
        with pytest.raises(ValueError, match=r"metrics\.jsonl: line \d does not fit its checksum"):
            read_curves(path)
    path.rename(memory_path / "old")
    Metrics(path, 3).write(LINES[2])
    assert len(path.read_bytes().splitlines()) == 1


def test_a_run_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    new = written(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 4, "lo')
    assert len(read_curves(path)["loss"]) == 3
    Metrics(path, 2).write(LINES[2])
    assert path.read_bytes() == new

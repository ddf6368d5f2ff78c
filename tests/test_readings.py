"""Explanations that a reader wrote: they replace the counted ones, are scored on held-out sentences, refused where wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from interpretability.explain import ExplainConfig
from interpretability.labels.readings import NAME
from interpretability.labels.token_statistics import split
from interpretability.labels.words import units_of
from interpretability.records import open_top
from tests import written_latents as written
from tests.test_explain import INDEX, LATENTS, WAR, explain

LATENT = INDEX["many words of one field"]
ROW = {"latent": LATENT, "title": "armies and their arms", "explanation": "Fires on what armies have.", "words": list(WAR)}


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("read") / "top"
    return written.write_top(path, written.sentences(), [fires for fires, _ in LATENTS.values()], n=20)


def write(path: Path, top: Path, *rows: dict[str, Any], **changed: Any) -> Path:
    content = {"sae_hash": open_top(top).provenance["sae_hash"], "reader": "a test", "readings": list(rows)} | changed
    path.write_text(json.dumps(content))
    return path


def test_readings_replace_and_are_scored_on_sentences_of_odd_rank(top: Path, tmp_path: Path) -> None:
    counted = explain(top, tmp_path / "counted")
    silent = ROW | {"latent": INDEX["never"]}
    found = explain(top, tmp_path / "read", "--readings", str(write(tmp_path / "r.json", top, ROW, silent)))
    assert {latent for latent in found if found[latent] != counted[latent]} == {LATENT}
    mine = found[LATENT]
    assert (mine.title, mine.explanation, mine.method, mine.model) == (ROW["title"], ROW["explanation"], NAME, "a test")
    details = mine.details["score"]
    _, held_out = split(open_top(top).sentences(LATENT))
    hits = sum(any(unit in WAR for unit in units_of(sentence.text).folded) for sentence in held_out)
    assert (details["found"], details["held_out"]) == (hits, len(held_out))
    by_hand = (details["found"] / details["held_out"] + 1 - details["others_found"] / details["others"]) / 2
    assert mine.score == pytest.approx(by_hand, abs=1e-4)
    assert by_hand > 0.9
    nonsense = write(tmp_path / "n.json", top, ROW | {"words": ["zeppelin"]})
    assert explain(top, tmp_path / "none", "--readings", str(nonsense))[LATENT].score == pytest.approx(0.5)


def test_the_same_command_with_other_readings_is_refused(top: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "r.json", top, ROW)
    explain(top, tmp_path / "out", "--readings", str(file))
    write(file, top, ROW | {"title": "war"})
    with pytest.raises(ValueError, match="readings_hash"):
        explain(top, tmp_path / "out", "--readings", str(file))


@pytest.mark.parametrize(
    ("rows", "changed", "fragment"),
    [
        ([ROW], {"sae_hash": "other"}, "'other'"),
        ([ROW, ROW], {}, rf"readings\[1\].*{LATENT}"),
        ([ROW | {"latent": 10_000}], {}, "10000"),
        ([ROW | {"latent": True}], {}, "latent is True"),
        ([ROW | {"title": "one two three four five six seven"}], {}, "1 to 6 words"),
        ([ROW | {"title": " "}], {}, "1 to 6 words"),
        ([ROW | {"words": []}], {}, r"words is \[\]"),
        ([ROW | {"words": [3]}], {}, r"words is \[3\]"),
        ([{"latent": 1}], {}, "latent, title, explanation, words"),
        ([7], {}, r"readings\[0\]"),
        ([], {"readings": None}, "readings is None"),
    ],
)
def test_what_is_no_reading_is_refused(
    top: Path, tmp_path: Path, rows: list[dict[str, Any]], changed: dict[str, Any], fragment: str
) -> None:
    file = write(tmp_path / "r.json", top, *rows, **changed)
    with pytest.raises(ValueError, match=fragment):
        explain(top, tmp_path / "out", "--readings", str(file))
    assert not (tmp_path / "out").exists()


def test_a_reader_is_no_language_model(top: Path) -> None:
    with pytest.raises(ValueError, match="--backend openai"):
        ExplainConfig(action="run", top=top, out=top, backend="openai", readings=top)

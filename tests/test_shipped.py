"""What ships for a model that is called by a word is found by every command, and what is not there is said in a line."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from core import shipped
from core.artifact import building
from core.cli import parse
from inference.complete import CompleteConfig
from inference.session import BEST_STRENGTHS, InferenceConfig, folders_of, open_session
from interpretability.search import SearchConfig
from interpretability.search import run as search
from llama3 import smollm2
from tests.tiny import tiny_llama
from tests.tiny_features import Features, SimpleConfig, alone, tiny_sae, write_features


@pytest.fixture
def ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Features:
    """A tiny model in the place of SmolLM2, with an SAE that ships."""
    model = tiny_llama(tmp_path / "model")
    features = write_features(tmp_path / "shipped", model, tiny_sae(model, "layers.1.resid_post"))
    monkeypatch.setitem(shipped.FOLDERS, "smollm2", tmp_path / "shipped")
    monkeypatch.setattr(smollm2, "fetch", lambda: model)
    return features


def test_a_session_opens_on_what_ships(ships: Features) -> None:
    with building(ships.sae.parent / "steering", "steering", SimpleConfig(), alone(), provenance=provenance(ships)) as builder:
        builder.publish(BEST_STRENGTHS, b'{"3": 1.5}')
        builder.finish([BEST_STRENGTHS], {})
    session = open_session(parse(CompleteConfig, "", ["--model", "smollm2"]), torch.device("cpu"))
    features = session.needs_features()
    assert features.site == "layers.1.resid_post"
    assert features.explanations
    assert features.best_strengths == {3: 1.5}


def provenance(ships: Features) -> dict[str, str]:
    from sae.model import load

    return {"sae_hash": load(ships.sae).weights_hash}


def test_explanations_and_strengths_may_lack(ships: Features) -> None:
    shutil.rmtree(ships.explanations)
    assert folders_of(InferenceConfig(model="smollm2")) == [(ships.sae, ships.top, None)]
    assert not open_session(InferenceConfig(model="smollm2"), torch.device("cpu")).needs_features().best_strengths


def test_flags_go_before_what_ships(ships: Features, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert folders_of(InferenceConfig(model="smollm2", top=(other,))) == [(ships.sae, other, ships.explanations)]
    chosen = InferenceConfig(model="smollm2", sae=(other,), top=(other,))
    assert folders_of(chosen) == [(other, other, None)]


@pytest.mark.parametrize("word", ["demo", "smollm2"])
def test_what_does_not_ship_is_said_in_a_line(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(shipped.FOLDERS, word, tmp_path / "nothing")
    with caplog.at_level(logging.INFO):
        assert folders_of(InferenceConfig(model=word)) == []
    assert [str(tmp_path / "nothing" / "sae") in record.message for record in caplog.records] == [True]
    with pytest.raises(ValueError, match=f"nothing.*--model {word}.*--sae"):
        parse(SearchConfig, "", ["--model", word, "--latent", "1"])


def test_the_search_finds_what_ships(ships: Features, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--text", "storms"], ["--positive", "the storm tore the roof"], ["--latents", "1", "3"], ["--latent", "3"]):
        search(parse(SearchConfig, "", ["--model", "smollm2", "--json", "--n", "2", "--device", "cpu", *flags]), alone())
        assert capsys.readouterr().out.startswith("{") or flags[0] == "--latents"
    with pytest.raises(ValueError, match="--sae is missing"):
        parse(SearchConfig, "", ["--latent", "1"])


def test_every_word_has_its_folder_beside_the_packages() -> None:
    assert Path(shipped.__file__).resolve().parents[1] / "demo" == shipped.FOLDER
    found = shipped.shipped_for("demo")
    assert found is not None
    assert all(path is not None and path.is_dir() for path in found)
    assert shipped.shipped_for("./demo") is None
    assert shipped.absence("./demo") == ""

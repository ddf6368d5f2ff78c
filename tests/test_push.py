"""sae.push and sae.pull against a stand-in of the Hub, through huggingface_hub's own client; the card; what is refused."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from core.artifact import building, verify
from core.cli import StageConfig, parse
from sae import push as push_module
from sae.card import Subject, card
from sae.formats import FORMATS
from sae.pull import pull
from sae.push import PushConfig, push
from tests.fake_hub import FakeHub, fake_hub
from tests.sae_folders import ALONE

DEMO = Path("demo/sae").resolve()
EVALUATED = {
    name: {"value": 0.25, "definition": "a | b", "conditions": {"site": "layers.4.resid_post", "tokens": 12345}}
    for name in ("fvu", "l0", "ce_recovered", "kl", "cosine")
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache", monkeypatch) as running:
        yield running


def config(to: str, folder: Path = DEMO, **more: Any) -> PushConfig:
    return PushConfig(sae=folder, to=to, **more)


def test_what_is_pushed_comes_back_and_loads(hub: FakeHub, tmp_path: Path) -> None:
    address = push(config("owner/name", private=True))
    assert address.startswith(hub.url)
    assert hub.private == {"owner/name": True}
    assert set(hub.repositories["owner/name"]) == {"cfg.json", "sae.safetensors", "manifest.json", "README.md"}
    assert sum("/commit/" in path for path in hub.requests) == 1, "all files or none"
    manifest = pull("owner/name", tmp_path / "pulled")
    assert manifest.hash == verify(DEMO).hash
    assert pull("owner/name", tmp_path / "pulled").hash == manifest.hash, "again into the same folder"
    x = torch.randn(3, 256)
    for source in ("owner/name", tmp_path / "pulled"):
        torch.testing.assert_close(sae.load(source)(x), sae.load(DEMO)(x), rtol=0, atol=0)


def test_several_saes_of_a_repository(hub: FakeHub, tmp_path: Path) -> None:
    for place in ("layers.3", "layers.4"):
        push(config(f"owner/name:{place}"))
    assert "layers.4/README.md" in hub.repositories["owner/name"]
    assert sae.load("owner/name:layers.4").weights_hash == sae.load(DEMO).weights_hash
    assert not [path for path in hub.requests if "resolve" in path and "layers.3" in path], "only what is asked for is fetched"
    with pytest.raises(ValueError, match=r"holds 2 SAEs.*owner/name/layers\.3, owner/name/layers\.4"):
        pull("owner/name", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_card_of_ones_own_stays(hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "sae")
    (tmp_path / "sae" / "README.md").write_text("# Mine\n")
    push(config("owner/name", tmp_path / "sae"))
    assert hub.repositories["owner/name"]["README.md"] == b"# Mine\n"


def test_the_card_says_what_was_measured_and_how_to_use_it() -> None:
    made = sae.load(DEMO)
    text = card(Subject(made, "owner/name", "mit", EVALUATED))
    assert text.startswith("---\n")
    assert "license: mit" in text
    assert "base_model" not in text, "the embedded model is not on the Hub"
    assert "| fvu | 0.25 | a \\| b |" in text
    assert "| tokens | 12,345 |" in text
    assert "cosine" not in text
    assert "load_from_disk" in text
    made.cfg = replace(made.cfg, provenance=made.cfg.provenance | {"model": "Llama-3.2-1B"})
    text = card(Subject(made, "owner/name"))
    assert "base_model: meta-llama/Llama-3.2-1B" in text
    assert "model.model.layers[4].register_forward_hook" in text
    assert "sae.evaluate" in text


def test_the_plan_writes_nothing(hub: FakeHub) -> None:
    text = push(config("owner/name", plan=True))
    assert "sae.safetensors" in text
    assert not hub.requests


def refused(message: str, *flags: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        push(parse(PushConfig, "", list(flags)))
    assert "\n" not in str(raised.value)


def test_trouble_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    refused("expected a Hub id", str(DEMO), "name")
    refused("no SAE of ours", "demo/model", "owner/name")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    refused("token's rights", str(DEMO), "owner/name")
    monkeypatch.delenv("HF_TOKEN")
    refused("owner/name: writing to the Hub needs a token: log in", str(DEMO), "owner/name")
    with pytest.raises(ValueError, match="owner/absent: no such folder here and no such repository"):
        pull("owner/absent", tmp_path / "out")
    hub.repositories["owner/theirs"] = FORMATS["sparsify"].write(sae.load(DEMO))
    with pytest.raises(ValueError, match=r"another library.*sae\.adopt owner/theirs"):
        pull("owner/theirs", tmp_path / "out")


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    with fake_hub(tmp_path / "cache", monkeypatch):
        pass
    monkeypatch.setattr(sys, "argv", ["push", str(DEMO), "owner/name"])
    with pytest.raises(SystemExit) as ended:
        push_module.main()
    assert ended.value.code == 2
    assert "owner/name: the Hub does not answer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the Hub does not answer"):
        pull("owner/name", tmp_path / "out")


def test_a_damaged_or_occupied_folder_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    push(config("owner/name"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        pull("owner/name", out)
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == ["notes.txt"]
    hub.repositories["owner/name"]["cfg.json"] = hub.repositories["owner/name"]["cfg.json"][:-1] + b" "
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"cfg\.json.*damaged"):
        pull("owner/name", tmp_path / "other")


def evaluation(folder: Path, sae_hash: str) -> Path:
    with building(folder, "evaluation", StageConfig(), ALONE, provenance={"sae_hash": sae_hash}) as builder:
        builder.finish([builder.publish("evaluation.json", json.dumps(EVALUATED).encode()).name], {})
    return folder


def test_only_an_evaluation_of_this_sae_is_taken(tmp_path: Path) -> None:
    own = evaluation(tmp_path / "own", sae.load(DEMO).weights_hash)
    assert "| kl | 0.25 |" in push(config("owner/name", evaluation=own, plan=True))
    other = evaluation(tmp_path / "other", "0123")
    for folder, message in ((other, "of another SAE: its weights' hash is 0123"), (DEMO, "of kind evaluation")):
        with pytest.raises(ValueError, match=message):
            push(config("owner/name", evaluation=folder, plan=True))


def test_the_card_of_an_adopted_sae_says_where_it_comes_from() -> None:
    made = sae.load(DEMO)
    how = {"source": "owner/theirs:layers.4", "revision": "abc", "norm": "none", "fvu": 0.3, "sentences": 300}
    made.cfg = replace(made.cfg, provenance=made.cfg.provenance | {"adopted": how})
    text = card(Subject(made, "owner/name"))
    assert "| source | owner/theirs:layers.4 |" in text
    assert "over 300 sentences" in text

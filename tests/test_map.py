"""The map: groups stay groups, the same bytes from the same inputs, what it shows, and the page in a real browser."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from core.artifact import verify
from interpretability import map as feature_map
from interpretability import report
from interpretability.labels.first import shown_first
from interpretability.map import MAP_FILE, MapConfig, contents, coordinates, read_map
from interpretability.opening import open_top_of
from interpretability.records import read_explanations
from interpretability.report import REPORT_FILE, ReportConfig
from sae.model import load
from tests.browser import open_browser
from tests.interp_folders import solo
from tests.test_report_page import until
from tests.tiny import tiny_llama
from tests.tiny_features import Features, tiny_sae, write_features

if find_spec("umap") is None:
    pytest.skip("the extra viz is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process for UMAP, as its stage has one: where it has run, products round differently."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def run_stage(config: MapConfig) -> None:
    feature_map.run(config, solo())


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    root = tmp_path_factory.mktemp("map")
    model = tiny_llama(root / "model")
    return write_features(root, model, tiny_sae(model, "layers.1.resid_post"))


def config(features: Features, out: Path) -> MapConfig:
    return MapConfig(sae=features.sae, top=features.top, explanations=features.explanations, out=out)


def test_groups_of_directions_stay_groups(features: Features, tmp_path: Path, elsewhere: ProcessPoolExecutor) -> None:
    """Three bundles of directions in 16 dimensions: each point's nearest on the map is of its own bundle."""
    generator = torch.Generator().manual_seed(0)
    middles = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=1)
    rows = torch.cat([middle + 0.1 * torch.randn(20, 16, generator=generator) for middle in middles]) * 3
    found = elsewhere.submit(coordinates, rows, config(features, tmp_path)).result()
    assert found.shape == (60, 2)
    assert found.min() == 0
    assert found.max() == 1
    for i in range(60):
        distance = np.linalg.norm(found - found[i], axis=1)
        distance[i] = np.inf
        assert distance.argmin() // 20 == i // 20
    with pytest.raises(ValueError, match="needs 4 latents that fire at least; found 3"):
        coordinates(rows[:3], config(features, tmp_path))


def test_what_the_map_says(features: Features) -> None:
    sae = load(features.sae)
    top, explanations = open_top_of(sae, features.top), read_explanations(features.explanations)
    latents = [i for i in range(48) if top.firing_counts[i]]
    places = np.random.default_rng(0).random((len(latents), 2))
    data = contents(latents, places, top, explanations)
    assert data["titles"] == [explanations[i].title for i in latents]
    assert sorted(data["order"]) == [i for i, latent in enumerate(latents) if explanations[latent].state == "valid"]
    first = shown_first(explanations, top.peak_variety)
    assert [latents[place] for place in data["order"]] == [latent for latent in first if latent in latents]
    by = {colour["name"]: colour for colour in data["colours"]}
    assert by.keys() == {"by score", "by density"}, "no sentence has a label, and no explanation a kind"
    assert by["by score"]["values"] == pytest.approx([explanations[i].score for i in latents])
    assert feature_map._topic(["war"] * 3 + [None] * 7) == "war"
    assert feature_map._topic(["war"] * 2 + [None] * 8) is None
    assert feature_map._topic(["war"]) is None
    many = feature_map._categories("x", ["a", "b", None, "a"])
    assert many == {"name": "x", "names": ["a", "b"], "values": [0, 1, -1, 0]}


def test_the_stage_and_the_page(features: Features, tmp_path: Path, elsewhere: ProcessPoolExecutor) -> None:
    for name in ("map", "again"):
        elsewhere.submit(run_stage, config(features, tmp_path / name)).result()
    assert verify(tmp_path / "map").kind == "map"
    page = (tmp_path / "map" / MAP_FILE).read_bytes()
    assert page == (tmp_path / "again" / MAP_FILE).read_bytes()
    data = read_map(tmp_path / "map")
    flags = {"top": features.top, "explanations": features.explanations, "map": tmp_path / "map"}
    report.run(ReportConfig(**flags, out=tmp_path / "report"), solo())
    assert verify(tmp_path / "report").kind == "report"
    with open_browser() as browser:
        opened = browser.new_page(viewport={"width": 900, "height": 700})
        said: list[str] = []
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.goto((tmp_path / "report" / REPORT_FILE).as_uri())
        opened.get_by_role("link", name="Map").click()
        until(opened, "typeof view !== 'undefined' && view.scale > 1")
        for place in (0, len(data["latents"]) // 2):
            x, y = opened.evaluate(f"[px({place}), py({place})]")
            opened.mouse.move(x, y)
            assert opened.evaluate("data.latents[view.hover]") == data["latents"][place]
            assert data["titles"][place] in opened.inner_text("#tip")
        opened.fill("#query", data["titles"][0])
        until(opened, "view.found && view.found.size > 0")
        opened.fill("#query", "")
        opened.mouse.move(5, 400)
        before = opened.evaluate("view.scale")
        opened.mouse.wheel(0, -240)
        until(opened, f"view.scale > 1.5 * {before}")
        opened.reload()
        until(opened, "view.scale > 1")
        x, y = opened.evaluate("[px(0), py(0)]")
        opened.mouse.click(x, y)
        opened.wait_for_selector("#dialog-body .halves")
        assert opened.url.endswith(f"{REPORT_FILE}#latent={data['latents'][0]}")
        assert said == []
    assert json.loads((tmp_path / "map" / "map.json").read_text())["latents"] == data["latents"]

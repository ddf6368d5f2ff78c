"""Probes and alarms: on made coordinates whose answers are known, then the stage on a tiny Llama with labelled texts."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

from capture import sentences
from core.artifact import verify
from sae.probe import ProbeConfig, run
from sae.probing.alarms import Share, latent_alarm, threshold_for
from sae.probing.probes import Split, difference_of_means, logistic, strongest
from tests.sae_folders import ALONE
from tests.test_sae_evaluate import House, make_house, sae_of


def made(n: int = 400, m: int = 12, signal: float = 3.0) -> Split:
    """Coordinate 5 rises with the label, all others are noise of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, m, generator=generator) * torch.logspace(-2, 2, m), torch.arange(n) % 2 == 0
    x[:, 5] += signal * y * x[:, 5].std()
    half = n // 2
    return Split(x[:half], y[:half], x[half:], y[half:], torch.arange(half) // 4)


def test_the_coordinate_that_tells_is_chosen_whatever_its_size() -> None:
    split = made()
    assert strongest(split.x, split.y, 1).tolist() == [5]
    assert sorted(strongest(split.x, split.y, 99).tolist()) == list(range(12))
    found = logistic(split, 1, 50, 0)
    assert found.chosen == [5]
    auc = roc_auc_score(split.test_y.numpy(), split.test_x[:, 5].numpy())
    assert found.auc.value == pytest.approx(auc)
    assert found.accuracy.value > 0.88
    low, high = found.auc.interval or (1.0, 0.0)
    assert low < auc < high < 1.0001
    assert difference_of_means(split, 0, 0).auc.value < 0.75, "loud noise drowns it"
    nothing = logistic(made(signal=0.0), 1, 0, 0)
    assert 0.35 < nothing.auc.value < 0.65, "scored on other documents"
    assert nothing.auc.interval is None


def test_thresholds_keep_their_rate() -> None:
    values = torch.arange(100.0)
    for rate, at in ((0.0, 99.0), (0.01, 98.0), (0.1, 89.0), (0.999, 0.0)):
        assert threshold_for(values, rate) == at
        assert float((values > at).double().mean()) <= max(rate, 0.0) + 1e-12
    assert threshold_for(torch.zeros(10), 0.1) == 0


def test_an_alarm_is_set_on_some_documents_and_measured_on_others() -> None:
    found = latent_alarm(made(2000), 0.05)
    assert found is not None
    assert found.latent == 5
    split = made(2000)
    rings = split.test_x[:, 5] > found.threshold
    assert found.false_alarms == (int((rings & ~split.test_y).sum()), int((~split.test_y).sum()))
    assert found.detected == (int((rings & split.test_y).sum()), int(split.test_y.sum()))
    low, high = found.false_alarms.record()["interval"]
    assert low < 0.05 < high
    assert latent_alarm(split._replace(y=~split.y, x=split.x * 0), 0.05) is None


@pytest.mark.parametrize(("count", "of", "bounds"), [(0, 10, (0, 0.3085)), (10, 10, (0.6915, 1)), (3, 20, (0.0321, 0.3789))])
def test_intervals_of_shares_are_clopper_and_pearsons(count: int, of: int, bounds: tuple[float, float]) -> None:
    assert Share(count, of).record()["interval"] == pytest.approx(bounds, abs=1e-4)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return make_house(tmp_path_factory.mktemp("house"))


def labelled(folder: Path, labels: tuple[str | None, ...] = ("sea", "war")) -> Path:
    """One document a label in turn; the second label's sentences speak of other things."""
    words = {"sea": "water ships salt wind tide", "war": "guns march iron smoke fire"}
    lines = []
    for i in range(60):
        label = labels[i % len(labels)]
        said = words.get(str(label), "water iron").split()
        text = " ".join(f"{said[(i + j) % len(said)].capitalize()} {said[(i * 3 + j) % len(said)]} again." for j in range(3))
        lines.append(json.dumps({"text": text} | ({} if label is None else {"label": label})))
    source = folder / "texts.jsonl"
    source.write_text("\n".join(lines) + "\n")
    sentences.run(sentences.SentencesConfig(source=str(source), out=folder / "labelled"), ALONE)
    return folder / "labelled"


def test_the_stage_writes_probes_and_alarms(house: House, tmp_path: Path) -> None:
    sae_of(house, tmp_path / "sae")
    config = ProbeConfig(
        sae=tmp_path / "sae", model=str(house.model), corpus=labelled(tmp_path), out=tmp_path / "out", resamples=20,
        latents=(1, 5), false_alarms=0.05,
    )  # fmt: skip
    run(config, ALONE)
    assert [record.name for record in verify(tmp_path / "out").files] == ["probe.json", "probe.md"]
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert list(found["labels"]) == ["sea"], "the second label is the mirror of the first"
    sea = found["labels"]["sea"]
    assert sum(sea["fitted"] + sea["tested"]) == found["conditions"]["sentences"] == 180
    assert list(sea["probes"]) == ["latents", "dimensions", "components", "all dimensions", "difference of means"]
    assert sea["probes"]["all dimensions"]["all"]["auc"]["value"] > 0.9, "other words, other activations"
    assert len(sea["probes"]["latents"]["5"]["chosen"]) == 5
    assert sea["probes"]["latents"]["5"]["auc"]["value"] > 0.7
    assert 0 <= sea["alarm"]["latent"] < 64
    assert sea["alarm"]["false_alarm_rate"]["of"] == sea["tested"][1]
    assert sea["alarm"]["detection_rate"]["value"] > sea["alarm"]["false_alarm_rate"]["value"]
    assert "| label | 1 latents | 5 latents | 1 dimensions" in (tmp_path / "out" / "probe.md").read_text()
    before = (tmp_path / "out" / "probe.json").read_bytes()
    run(config, ALONE)
    assert (tmp_path / "out" / "probe.json").read_bytes() == before


@pytest.mark.parametrize(("labels", "message"), [(("sea",), "at least two labels"), ((None,), "found none")])
def test_labels_that_cannot_be_told_apart_are_refused(
    house: House, tmp_path: Path, labels: tuple[str | None, ...], message: str
) -> None:
    sae_of(house, tmp_path / "sae")
    config = ProbeConfig(sae=tmp_path / "sae", model=str(house.model), corpus=labelled(tmp_path, labels), out=tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run(config, ALONE)


@pytest.mark.parametrize("flags", [{"test_fraction": 1.0}, {"false_alarms": -0.1}, {"latents": (0,)}, {"latents": ()}])
def test_flags_out_of_range_are_refused(flags: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="--"):
        ProbeConfig(sae=Path("s"), model="m", corpus=Path("c"), out=Path("o"), **flags)  # type: ignore[arg-type]

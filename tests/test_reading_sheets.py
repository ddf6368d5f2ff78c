"""Sheets for readers: what is shown and hidden, controls that mix latents, and what two readers' judgments say."""

import json
import re
from pathlib import Path

import pytest

from interpretability.labels.token_statistics import split
from interpretability.records import TopSentence, open_top
from scripts.reading_sheets import (
    SENTENCES,
    JudgeConfig,
    WriteConfig,
    candidates,
    judge,
    kappa,
    marked,
    write,
)
from tests import written_latents as written
from tests.test_explain import LATENTS


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sheets") / "top"
    return written.write_top(path, written.sentences(), [fires for fires, _ in LATENTS.values()] * 3, n=20)


def items_of(folder: Path) -> dict[str, list[str]]:
    text = "\n".join(sheet.read_text() for sheet in sorted(folder.glob("sheet-*.md")))
    blocks = re.split(r"^## (\d+)\n", text, flags=re.MULTILINE)[1:]
    return {
        name: re.findall(r"^\d+\. (.*)$", block, re.MULTILINE) for name, block in zip(blocks[::2], blocks[1::2], strict=True)
    }


def test_tokens_that_fire_are_marked_and_long_sentences_are_cut_around_the_peak() -> None:
    tokens = [" a"] * 60 + [" storm", "\n", " at", " sea"] + [" b"] * 60
    values = [0.0] * 60 + [4.0, 0.5, 2.0, 3.0] + [0.0] * 60
    line = marked(TopSentence(0, "max", 0, 4.0, 0, "d", None, "".join(tokens), tokens, values))
    assert line == "..." + "a " * 24 + "[[storm]][ ] [at] [[sea]]" + " b" * 21 + "..."


def test_sheets_show_sentences_of_even_rank(top: Path, tmp_path: Path) -> None:
    able = candidates(open_top(top))
    write(WriteConfig(top=top, out=tmp_path / "s", latents=",".join(map(str, able[:2]))))
    found = items_of(tmp_path / "s")
    assert list(found) == [str(latent) for latent in able[:2]]
    even, _ = split(open_top(top).sentences(able[0]))
    plain = [re.sub(r"[\[\]]|^\.\.\.|\.\.\.$", "", line) for line in found[str(able[0])]]
    assert len(plain) == SENTENCES
    assert all(line in sentence.text for line, sentence in zip(plain, even, strict=False))


def test_blind_sheets_hide_latents_and_controls_mix_them(top: Path, tmp_path: Path) -> None:
    config = WriteConfig(top=top, out=tmp_path / "a", sample=4, controls=2, seed=3)
    write(config)
    key = json.loads((tmp_path / "a" / "key.json").read_text())["items"]
    assert list(key) == list(items_of(tmp_path / "a")) == [str(i) for i in range(1, 7)]
    latents = [item["latent"] for item in key.values() if "latent" in item]
    mixed = [latent for item in key.values() for latent in item.get("control", [])]
    assert len(latents) == 4
    assert len(mixed) == 2 * SENTENCES
    assert len({*latents, *mixed}) == len(latents) + len(mixed)
    write(WriteConfig(top=top, out=tmp_path / "b", sample=4, controls=2, seed=3))
    assert (tmp_path / "a" / "sheet-00.md").read_bytes() == (tmp_path / "b" / "sheet-00.md").read_bytes()
    with pytest.raises(ValueError, match="needed"):
        write(WriteConfig(top=top, out=tmp_path / "c", sample=4, controls=50))
    with pytest.raises(ValueError, match="--latents or --sample"):
        WriteConfig(top=top, out=tmp_path / "c", latents="1", sample=4)


def test_kappa_by_hand() -> None:
    assert kappa("aabb", "abab") == 0
    assert kappa("aabb", "aabb") == 1
    assert kappa("aa", "aa") == 1
    assert kappa("aaab", "aabb") == pytest.approx((0.75 - 0.5) / 0.5)


def test_judgments_are_counted_and_wrong_ones_refused(tmp_path: Path) -> None:
    key, a, b = (tmp_path / name for name in ("key.json", "a.json", "b.json"))
    key.write_text(json.dumps({"items": {"1": {"latent": 5}, "2": {"latent": 6}, "3": {"control": [1]}}}))
    a.write_text(json.dumps({"1": "concept", "2": "concept", "3": "none"}))
    b.write_text(json.dumps({"1": "concept", "2": "word", "3": "none"}))
    found = judge(JudgeConfig(key=key, judgments=(a, b)))
    assert found["latents"]["concept by both"] == 1
    assert [kinds["concept"] for kinds in found["latents"]["kinds"]] == [2, 1]
    assert found["controls"] == {
        "items": 1,
        "kinds": [{"concept": 0, "word": 0, "form": 0, "none": 1}] * 2,
        "concept by both": 0,
    }
    assert found["agreement"] == pytest.approx(2 / 3)
    b.write_text(json.dumps({"1": "concept", "2": "words", "3": "none"}))
    with pytest.raises(ValueError, match=r"b\.json.*wrong: 2"):
        judge(JudgeConfig(key=key, judgments=(a, b)))
    b.write_text(json.dumps({"1": "concept", "2": "word"}))
    with pytest.raises(ValueError, match=r"wrong: 3"):
        judge(JudgeConfig(key=key, judgments=(a, b)))

"""Completeness: lists of concepts, who names what, frequencies, the judge, and the stage from end to end."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.artifact import verify
from core.cli import parse
from interpretability import completeness
from interpretability.asking import AskConfig, Reply, Request
from interpretability.completeness import (
    PLOT_FILE,
    ROWS_FILE,
    SUMMARY_FILE,
    TABLE_FILE,
    CompletenessConfig,
    Firing,
    Row,
    by_frequency,
    chance,
    largest_on,
    wilson,
)
from interpretability.concepts import FOLDER, Concept, named_by, occurrences, read_concepts, words_of
from interpretability.prompts import MalformedReply
from interpretability.records import Explanation, read_explanations
from llama3 import load_model, load_tokenizer
from sae.model import load
from tests.interp_folders import make_corpus, solo
from tests.tiny import tiny_llama
from tests.tiny_features import SENTENCES, Features, tiny_sae, write_features

SITE = "layers.1.resid_post"


def concept(name: str, *others: str) -> Concept:
    return Concept("list", name, name, tuple(words_of(each) for each in (name, *others)))


def explanation(title: str, text: str = "", method: str = "llama", latent: int = 0) -> Explanation:
    return Explanation(latent, title, text, method, "", "valid")


def test_the_lists_that_ship_are_whole() -> None:
    found = read_concepts([FOLDER])
    lists = {c.list for c in found}
    assert lists == {"people", "countries", "cities", "code", "list_positions", "emotions", "topics"}
    assert all(sum(c.list == name for c in found) >= 20 for name in lists)
    assert len({(c.list, c.name) for c in found}) == len(found)
    assert all(c.names and all(c.names) for c in found)
    assert next(c for c in found if c.name == "for loop") == Concept(
        "code", "for loop", "for i in range(10):", (("for", "loop"), ("for",), ("loop",))
    )


@pytest.mark.parametrize("line", ["| text", "a | b | c | d", "... | "])
def test_a_line_that_is_no_concept_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.txt").write_text(f"# comment\n\nfine\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.txt: line 4 is no concept"):
        read_concepts([tmp_path])


def test_lists_that_are_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_concepts([tmp_path / "gone.txt"])
    with pytest.raises(ValueError, match="no concept in"):
        read_concepts([tmp_path])


@pytest.mark.parametrize(
    ("asked", "said", "named"),
    [
        (concept("soldiers"), explanation('"soldier"'), True),
        (concept("car"), explanation('"care"'), False),  # short words as they are
        (concept("New York"), explanation("York and new things"), True),
        (concept("New York"), explanation("the city of York"), False),
        (concept("Julius Caesar", "caesar"), explanation("Caesar's wars"), True),
        (concept("rivers"), explanation("water", "fires on rivers"), True),
        (concept("rivers"), explanation("water", "fires on rivers", "token_statistics"), False),  # its text quotes too much
        (concept("number one", "1"), explanation("items numbered 1."), True),
        (concept("Bogotá"), explanation("BOGOTÁ"), True),
    ],
)
def test_who_names_a_concept(asked: Concept, said: Explanation, named: bool) -> None:
    assert named_by(asked, said) is named


def test_occurrences_against_a_search_for_each_name() -> None:
    texts = ["New York is new.", "The new york times of New York, and York!", "Newcastle; Car, cars.", ""]
    asked = [concept("New York", "york"), concept("new"), concept("car", "cars"), concept("nowhere")]
    counts, total = occurrences(asked, texts)
    joined = "\n".join(texts).lower()
    for one, count in zip(asked, counts, strict=True):
        assert count == sum(len(re.findall(rf"\b{re.escape(' '.join(name))}\b", joined)) for name in one.names)
    assert total == len(re.findall(r"\w+", joined))


def test_wilson_against_published_values() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def row(count: int, naming: list[int] | None, asked: Concept | None = None, latents: Sequence[int] = (0,)) -> Row:
    return Row(asked or concept("x"), count, [Firing(latent, 1.0) for latent in latents], naming)


def test_bins_of_frequency() -> None:
    found = by_frequency([row(c, [0] if c > 3 else []) for c in (0, 0, 1, 3, 4, 15, 16, 63, 64)] + [row(2, None)])
    assert [(b["from"], b["to"], b["concepts"], b["found"], b["failed"]) for b in found] == [
        (0, 0, 2, 0, 0), (1, 3, 3, 0, 1), (4, 15, 2, 2, 0), (16, 63, 2, 2, 0), (64, 255, 1, 1, 0)
    ]  # fmt: skip


def test_chance_holds_each_concept_against_the_others() -> None:
    said = {0: explanation("storms"), 1: explanation("storms at sea"), 2: explanation("kings")}
    rows = [row(1, [0], concept("storm"), [0]), row(1, [1], concept("sea"), [1]), row(1, [2], concept("king"), [2])]
    # Only "storm" is named by another's latent: one of the six pairs.
    assert chance(rows, said) == pytest.approx(1 / 6)
    assert chance(rows[:1], said) is None


@dataclass(frozen=True)
class Made:
    features: Features
    corpus: Path
    concepts: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("completeness")
    model = tiny_llama(root / "model")
    sae = tiny_sae(model, SITE)
    corpus = make_corpus(root / "corpus", SENTENCES)
    sae.cfg.provenance["corpus_hash"] = verify(corpus).hash
    concepts = root / "concepts"
    concepts.mkdir()
    (concepts / "weather.txt").write_text("storm\nsoup | stir the soup | kitchen\nkings || king\n")
    (concepts / "none.txt").write_text("zebra\n")
    return Made(write_features(root, model, sae), corpus, concepts)


def config(made: Made, out: Path, **flags: Any) -> CompletenessConfig:
    paths = {name: getattr(made.features, name) for name in ("sae", "explanations")}
    found = CompletenessConfig(
        **paths, model=str(made.features.model), corpus=made.corpus, out=out, concepts=(made.concepts,), yes=True
    )
    return replace(found, **flags)


def test_the_largest_latents_against_the_dense_row(made: Made) -> None:
    model, tokenizer, sae = load_model(made.features.model), load_tokenizer(made.features.model), load(made.features.sae)
    found = largest_on(Concept("l", "soup", "stir the soup", ()), " {}", 4, sae, model, tokenizer, SITE)
    ids = [tokenizer.bos_id, *tokenizer.encode(" stir the soup")]
    h = sae.pre_activations(sae.normalise(model.capture(torch.tensor([ids]), sites=[SITE])[SITE][0]).z)[-1].tolist()
    order = sorted(range(len(h)), key=lambda i: -h[i])[:4]
    assert [hit.latent for hit in found] == [i for i in order if h[i] > 0]
    assert [hit.activation for hit in found] == pytest.approx([h[i] for i in order if h[i] > 0], abs=1e-5)


def test_the_stage_by_words(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completeness.run(config(made, tmp_path / "out", features=6), solo())
    assert verify(tmp_path / "out").counts["concepts"] == 4
    rows = [json.loads(line) for line in (tmp_path / "out" / ROWS_FILE).read_text().splitlines()]
    said = read_explanations(made.features.explanations)
    for found in rows:
        words = {"storm": "storms", "soup": "kitchens", "kings": "kings", "zebra": "zebra"}[found["concept"]]
        naming = [f["latent"] for f in found["features"] if words in (said[f["latent"]].title if f["latent"] in said else "")]
        assert found["naming"] == naming
        assert found["found"] == bool(naming)
    assert {found["concept"]: found["mentions"] for found in rows} == {"storm": 1, "soup": 1, "kings": 1, "zebra": 0}
    summary = json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())
    assert summary["lists"]["none"]["share"] == 0.0
    assert summary["lists"]["none"]["chance"] is None
    assert (tmp_path / "out" / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == (tmp_path / "out" / TABLE_FILE).read_text() + "\n"


class Fake:
    """Names the first feature of everything but soup, and babbles once."""

    name, model, files = "fake", "fake-1", ["raw/replies.jsonl"]

    def __init__(self, builder: Any, asked: list[Request]) -> None:
        builder.publish(self.files[0], b"")
        self._asked = asked

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        self._asked += requests
        for i, request in enumerate(reversed(requests)):
            text = "no JSON" if i == 0 else '{"names": []}' if '"soup"' in request.user else 'Well. {"names": [1]}'
            yield Reply(request.key, text)


def test_the_stage_by_a_language_model(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def fake(backend: str, asking: AskConfig, builder: Any, device: torch.device) -> Fake:
        assert (backend, asking.model, type(asking)) == ("openai", "judge", AskConfig)
        return Fake(builder, asked)

    monkeypatch.setattr(completeness, "asker_of", fake)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of 4 answers failed .*--max-failed-share 0.1"):
            completeness.run(config(made, tmp_path / "out", backend="openai", judge_model="judge"), solo())
    rows = [json.loads(line) for line in (tmp_path / "out" / ROWS_FILE).read_text().splitlines()]
    first = {found["concept"]: found["features"][0]["latent"] for found in rows}
    assert {found["concept"]: found["naming"] for found in rows} == {
        "zebra": [first["zebra"]], "storm": [first["storm"]], "soup": [], "kings": None
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())["lists"]["weather"]["failed"] == 1
    lines = [json.loads(line) for line in asked[0].user.splitlines()]
    assert lines[0] == {"concept": "zebra", "for example": "zebra"}
    assert [line["feature"] for line in lines[1:]] == list(range(1, len(lines)))


@pytest.mark.parametrize("text", ['{"names": [0]}', '{"names": [4]}', '{"names": [true]}', '{"names": "1"}', "{}", "1, 2"])
def test_an_answer_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(MalformedReply):
        completeness.parse(text, 3)
    assert completeness.parse('{"names": [3, 1, 3]}', 3) == [0, 2]


def test_what_does_not_belong_together_is_refused(made: Made, tmp_path: Path) -> None:
    other = make_corpus(tmp_path / "other", SENTENCES[:3])
    with pytest.raises(ValueError, match=r"other.*corpus_hash is"):
        completeness.run(config(made, tmp_path / "out", corpus=other), solo())
    flags = ["--sae", "a", "--model", "m", "--explanations", "e", "--corpus", "c", "--out", "o"]
    for more in (["--features", "0"], ["--template", "none"]):
        with pytest.raises(ValueError, match="--template must hold"):
            parse(CompletenessConfig, "", [*flags, *more])

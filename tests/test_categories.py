"""Categories named by a model's embeddings, here written down: each word lies where its meaning is said to be."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from interpretability.explain import categories_of
from interpretability.labels.categories import FILE, MAX_WORDS, MIN_COSINE, Categories, read_categories
from interpretability.labels.titles import MAX_TITLE_WORDS, Clues, title_of
from interpretability.labels.token_statistics import TokenStatistics
from interpretability.records import Explanation, PoolSentence, TopSentences, open_top
from llama3 import load_model, load_tokenizer
from tests import written_latents as written
from tests.tiny import tiny_llama

WAR = ("army", "soldiers", "regiment", "troops", "enemy", "artillery", "invasion", "guns", "trench")
BREAD = ("bread", "oven", "dough", "flour", "baker", "loaf")
KNOWN = {"war": ["army", "troops", "enemy", "guns"], "baking": ["bread", "dough", "flour", "oven"]}


class Words:
    """A tokenizer of whole words; one that it does not know is as many pieces as it has letters."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = [*words, *"abcdefghijklmnopqrstuvwxyz"]

    @property
    def n_vocab(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        word = text.strip().lower()
        return [self.words.index(word)] if word in self.words else [self.words.index(c) for c in word]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [f" {self.words[i]}" for i in ids]


FILLERS = tuple(f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "lmnpr")


@pytest.fixture(scope="module")
def embedded() -> tuple[torch.Tensor, Words]:
    """Words about war in one direction, about baking in another, others anywhere. All share a large mean, and differ most in
    a direction that says nothing of meaning, as frequency does."""
    tokenizer = Words([*WAR, *BREAD, *FILLERS])
    rows = torch.randn(tokenizer.n_vocab, 64, generator=torch.Generator().manual_seed(0))
    rows[:, 2] += torch.linspace(-60, 60, len(rows))[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    rows[: len(WAR), 0] += 12
    rows[len(WAR) : len(WAR) + len(BREAD), 1] += 12
    return rows + 5, tokenizer


@pytest.fixture(scope="module")
def categories(embedded: tuple[torch.Tensor, Any]) -> Categories:
    return Categories(*embedded, KNOWN)


def cosines(embedded: tuple[torch.Tensor, Words], words: Sequence[str], category: str) -> list[float]:
    """Word for word, with the main direction taken from a decomposition."""
    rows, tokenizer = embedded
    whole = [rows[i].double() for i, word in enumerate(tokenizer.words) if len(word) >= 3]
    mean = torch.stack(whole).mean(0)
    main = torch.linalg.svd(torch.stack(whole) - mean)[2][0]

    def direction(word: str) -> torch.Tensor:
        x = rows[tokenizer.encode(word)[0]].double() - mean
        return F.normalize(x - (x @ main) * main, dim=0)

    centre = F.normalize(torch.stack([direction(word) for word in KNOWN[category]]).mean(0), dim=0)
    return [float(direction(word) @ centre) for word in words]


def test_words_of_one_field_are_named_by_it(categories: Categories, embedded: tuple[torch.Tensor, Words]) -> None:
    weights = {"soldiers": 3.0, "Army": 2.0, "artillery": 2.0, "trench": 1.0, "bal": 2.0, "gum": 1.0}
    found = categories.of(weights)
    assert found is not None
    near = [word for word, c in zip(weights, cosines(embedded, list(weights), "war"), strict=True) if c >= MIN_COSINE]
    assert found.name == "war"
    assert list(found.words) == sorted(near, key=lambda word: -weights[word])
    assert found.share == pytest.approx(sum(weights[word] for word in near) / 11)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"soldiers": 1.0, "army": 1.0},
        dict.fromkeys(FILLERS[:12], 1.0) | {"soldiers": 1.0, "army": 1.0, "guns": 1.0},
        {"soldiers": 9.0, "army": 1.0, "guns": 1.0, "trench": 1.0},
        {"army": 1.0, "armies": 1.0, "unheardof": 1.0},
    ],
    ids=["none", "two words", "little of the weight", "one word has most of it", "unknown words"],
)
def test_nothing_is_named_where_too_little_speaks_for_it(categories: Categories, weights: dict[str, float]) -> None:
    assert categories.of(weights) is None


def test_accidents_are_those_that_mean_something_else(categories: Categories) -> None:
    assert categories.alike({"bread": 2.0, "flour": 1.0, "loaf": 1.0, "gum": 1.0}) >= {"bread", "flour", "loaf"}
    assert "soldiers" not in categories.alike({"bread": 2.0, "flour": 1.0, "oven": 1.0, "soldiers": 1.0})
    assert categories.alike({"bread": 1.0}) == categories.alike({}) == set()
    many = dict.fromkeys(FILLERS[:MAX_WORDS], 2.0) | {"bread": 1.0, "flour": 1.0}
    assert not {"bread", "flour"} & categories.alike(many)  # of smaller weight than those that are looked at


def test_titles_name_the_category_and_then_its_words(categories: Categories, tmp_path: Path) -> None:
    """Of three latents: one fires on words of war, one on a single one of them, one on the same words and an accident."""
    sentences = written.sentences()
    on_war = written.on(*WAR)
    accident = next(s for s in sentences if "kettle" in s.text.lower())

    def once(s: written.Sentence, i: int) -> float:
        return 9.0 if s.sentence_id == accident.sentence_id and s.tokens[i].strip().lower() == "kettle" else on_war(s, i)

    top = open_top(written.write_top(tmp_path / "top", sentences, [on_war, written.on("soldiers"), once], n=40))
    rest = [PoolSentence(s.sentence_id, s.text, s.label) for s in sentences]
    titles = [found.title for found in _explain(top, rest, categories)]
    assert titles[0].startswith('war: "')
    assert titles[1].startswith('"soldiers"')
    assert titles[2].startswith('war: "')
    assert all(len(title.split()) <= MAX_TITLE_WORDS and "kettle" not in title for title in titles)
    plain = list(_explain(top, rest, None))
    assert not any("war:" in found.title or found.details["category"] for found in plain)


def _explain(top: Any, rest: list[PoolSentence], categories: Categories | None) -> list[Explanation]:
    return list(TokenStatistics(top, rest, 200, 0, categories).explain(range(3)))


def test_words_of_one_sentence_are_in_no_title_where_others_recur() -> None:
    clues = Clues(None, None, ["harbour", "home"], ["harbour", "home", "foreskin"], [], [], {}, spread=False)
    assert title_of(None, clues) == '"harbour", "home" and others'
    assert title_of(None, clues._replace(fired=["harbour"])) == 'mixed: "harbour", "home", "foreskin"'
    assert title_of(None, clues._replace(fired=[], common=["ship", "tide"])) == "in text with ship, tide"
    assert title_of(None, clues._replace(fired=[], once=[])) == "white space"


def test_the_file_that_ships() -> None:
    known = read_categories(FILE)
    assert len(known) > 100
    assert all(len(name.split()) < MAX_TITLE_WORDS for name in known)
    assert all(len(set(words)) == len(words) >= 4 for words in known.values())


@pytest.mark.parametrize("line", ["war army troops enemy", "war: army", ": a, b, c", "war: a, b, c\nwar: d, e, f"])
def test_a_line_that_is_no_category_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "own.txt").write_text(f"# a comment\n\n{line}\n")
    with pytest.raises(ValueError, match=r"own\.txt: line \d is no category"):
        read_categories(tmp_path / "own.txt")


def test_another_model_than_that_of_the_latents_is_refused(tmp_path: Path) -> None:
    top = open_top(written.write_top(tmp_path / "top", written.sentences(50), [written.on("the")], n=4))
    with pytest.raises(ValueError, match=r"the model of --model.*model_hash"):
        categories_of(str(tiny_llama(tmp_path / "model")), top)


def test_embeddings_that_do_not_know_the_categories_name_none(
    embedded: tuple[torch.Tensor, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Categories(*embedded, KNOWN).known == 1
    mixed = {"war": ["army", "troops", "flour", "dough"], "baking": ["bread", "oven", "enemy", "guns"]}
    assert Categories(*embedded, mixed).known < 0.5
    model = str(tiny_llama(tmp_path / "model"))
    own = {"model_hash": load_model(model).weights_hash, "tokenizer_hash": load_tokenizer(model).hash}
    assert categories_of(model, cast(TopSentences, SimpleNamespace(provenance=own))) is None
    assert "no category is named" in caplog.text


def test_without_known_words_nothing_is_named(embedded: tuple[torch.Tensor, Any]) -> None:
    assert Categories(*embedded, {"far": ["unheard", "unseen", "unsaid"]}).of(dict.fromkeys(WAR, 1.0)) is None
    assert json.dumps(Categories(*embedded, {}).names) == "[]"

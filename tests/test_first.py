"""What is shown first: concepts before single words, clear labels before vague ones, what steers, no subject over and over."""

from typing import Any

import numpy as np
import pytest

from inference.session import N_PRESETS, Features
from interpretability.labels.first import PLAIN, readable, shown_first, subject
from interpretability.records import Explanation


def explained(latent: int, title: str, score: float | None = 0.8, **changes: Any) -> Explanation:
    values: dict[str, Any] = {"method": "token_statistics", "model": "", "state": "valid", "explanation": "", "score": score}
    return Explanation(latent=latent, title=title, **(values | changes))


def ordered(variety: list[float], *explanations: Explanation, steering: tuple[int, ...] = ()) -> list[int]:
    return shown_first({e.latent: e for e in explanations}, np.array(variety, np.float32), steering)


WAR = {"category": {"name": "war", "share": 0.6, "words": ["army"]}}


def test_a_perfect_score_on_a_single_word_comes_last() -> None:
    word, concept = explained(0, '"gold"', 1.0), explained(1, 'war: "army", "troops"', 0.6, details=WAR)
    vague = explained(2, 'mixed: "history", "beds", "years"', 0.5)
    assert ordered([0.0, 0.7, 0.9], word, concept, vague) == [1, 2, 0]


def test_worth_is_the_product_of_what_is_known() -> None:
    """Each factor by itself decides between two that are alike else; a latent is not the tie-break unless all are."""
    good = {"title": '"bread", "flour"', "score": 0.9}
    assert ordered([0.4, 0.5], explained(0, **good), explained(1, **good | {"title": '"ships", "harbour"'})) == [1, 0]
    assert ordered([0.5, 0.5], explained(0, **good), explained(1, '"ships", "harbour"', 0.95)) == [1, 0]
    assert ordered([0.5, 0.5], explained(0, 'words ending "-ing"', 0.95), explained(1, **good)) == [1, 0]
    assert ordered([0.5, 0.5], explained(0, **good), explained(1, '"ships", "harbour"', 0.9), steering=(1, 0)) == [1, 0]
    assert ordered([0.5, 0.5], explained(0, **good), explained(1, '"ships", "harbour"', 0.9)) == [0, 1]
    # Grammar is not left out: a quarter of a large worth is more than a small one.
    assert ordered([0.9, 0.1], explained(0, "years: 1812, 1971", 1.0), explained(1, **good)) == [0, 1]
    assert PLAIN * 0.9 * 1.0 > 0.1 * 0.8


def test_where_steering_was_measured_what_steers_comes_first() -> None:
    found = [explained(i, f'"word{i:02}", "other"') for i in range(4)]
    assert ordered([0.9, 0.8, 0.4, 0.5], *found, steering=(3, 2)) == [3, 2, 0, 1]
    # An effect of rank two of three against one: 2/3 of a larger variety is more.
    assert ordered([0.9, 0.8, 0.4, 0.5], *found, steering=(2, 0, 3))[:2] == [0, 2]


def test_the_second_on_a_subject_counts_for_half() -> None:
    titles = ['war: "army", "troops"', 'war: "siege", "guns"', '"tide", "harbour"', "text about war"]
    found = [explained(i, title, details=WAR if title.startswith("war") else {}) for i, title in enumerate(titles)]
    assert ordered([0.8, 0.7, 0.5, 0.6], *found) == [0, 2, 1, 3]
    assert ordered([0.8, 0.7, 0.3, 0.0], *found) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("title", "about"),
    [
        ('law and courts: "judge"', "law"),
        ('"Trade", "exchange": money', "trade"),
        ("text about bread", "bread"),
        ("Court proceedings", "court"),
        ("period, comma: twenty", "period"),
        ("!", "!"),
    ],
)
def test_subjects(title: str, about: str) -> None:
    assert subject(explained(0, title)) == about


def test_labels_that_say_a_meaning() -> None:
    assert readable(explained(0, '"bread", "oven" and others'))
    assert readable(explained(0, "text about bread"))
    tokens = {"tokens": [{"token": " Bread", "share": 0.4}, {"token": "Lu", "share": 0.3}]}
    assert readable(explained(0, '"bread", "oven"', details=tokens))
    assert not readable(explained(0, '"Lucena", "lucidum", "bread"', details=tokens))
    assert readable(explained(0, 'war: "six", "two"', details=WAR))
    assert not readable(explained(0, '"with", "without": army', details=WAR))  # which no title names
    assert readable(explained(0, "courts and trials", method="reading"))
    plain = ('"They"', '"to"', 'words beginning "ab-"', "names: Rome", "period", 'mixed: "army", "tea"', "text with a, b")
    assert not any(readable(explained(0, title)) for title in plain)


def test_what_has_no_label_is_left_out_and_certainty_stands_in_for_a_score() -> None:
    failed = explained(0, "", state="failed")
    sure, unsure = (explained(i, t, None, certainty=c, method="llama") for i, t, c in ((1, "tides", 0.9), (2, "trains", 0.6)))
    assert ordered([1.0, 0.5, 0.5], failed, unsure, sure) == [1, 2]
    assert ordered([1.0, 0.5, 0.5, 0.1], failed, sure, explained(3, "neither", None)) == [1, 3]


class Top:
    """Of top sentences, what the order of features reads."""

    def __init__(self, variety: list[float]) -> None:
        self.peak_variety = np.array(variety, np.float32)


def test_presets_are_twelve_of_the_half_that_steers_most() -> None:
    n = 40
    found = {i: explained(i, f'"word{i:02}", "other"') for i in range(n)}
    strengths = {i: 0.5 + i / 100 for i in reversed(range(n))}  # the last steers most
    variety = [0.9] * n
    for i in range(25, 40):
        variety[i] = 0.2  # of the stronger half few are concepts
    features = Features(None, "site", Top(variety), found, strengths)  # type: ignore[arg-type]
    presets = features.presets
    assert len(presets) == N_PRESETS
    assert min(presets) >= 20
    assert list(presets)[:5] == [24, 23, 22, 21, 20]
    assert all(presets[latent] == strengths[latent] for latent in presets)
    assert features.first[:N_PRESETS] != list(presets)
    few = Features(None, "site", Top(variety), found, {3: 1.0, 5: 2.0})  # type: ignore[arg-type]
    assert few.presets == {3: 1.0, 5: 2.0}
    assert Features(None, "site", Top(variety), found).presets == {}  # type: ignore[arg-type]

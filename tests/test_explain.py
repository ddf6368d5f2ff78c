"""Explanations by token statistics: latents of known meaning get their meaning, and the score is what it says."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from core.artifact import open_artifact
from core.cli import parse
from interpretability.explain import ExplainConfig, run, sentences_to_compare
from interpretability.labels.label_score import score
from interpretability.labels.patterns import Found, Pattern, Sample, patterns_at
from interpretability.labels.titles import MAX_TITLE_WORDS
from interpretability.labels.token_statistics import PRIOR_WORDS, TokenStatistics, split
from interpretability.labels.words import akin, firings, kinds_of, spellings, units_of
from interpretability.records import Explanation, PoolSentence, TopSentence, open_top, read_explanations
from tests import written_latents as written
from tests.interp_folders import Folders, make_corpus, make_folders, random_texts, solo

WAR = ("army", "soldiers", "regiment", "troops", "battalion", "enemy", "artillery", "invasion", "shells", "guns", "trench")
LATENTS: dict[str, tuple[written.Fires, str]] = {
    "one word": (written.on("soldiers"), '"soldiers"'),
    "a word behind another": (written.behind("of", "the"), '"the" after "of"'),
    "a function word": (written.on("the"), '"the"'),
    "a function word of one topic": (written.where("war", written.on("the")), '"the" / war'),
    "two words": (written.on("she", "her"), '"she", "her"'),
    "a topic": (written.where("bread", written.everywhere), "text about bread"),
    "a topic of three words": (written.where("kings and empires", written.everywhere), "text about kings and empires"),
    "a sign": (written.on("?"), "question mark"),
    "the full stop": (written.on("."), "period"),
    "an ending": (written.matching("ing"), 'words ending "-ing"'),
    "years": (written.matching(r"1[0-9]{3}|20[0-9]{2}"), "years: "),
    "numbers": (written.matching(r"\d+"), "numbers: "),
    "the first word": (written.first, "first word of a sentence"),
    "The at the start": (lambda s, i: 2.0 if i == 0 and s.tokens[0] == "The" else 0.0, '"The" starting a sentence'),
    "behind to": (written.behind("to"), 'word after "to"'),
    "many words of one field": (written.on(*WAR), '"soldiers"'),
    "never": (lambda s, i: 0.0, ""),
    "in one sentence": (lambda s, i: 1.0 if (s.sentence_id, i) == (77, 4) else 0.0, '"'),
}
INDEX = {name: latent for latent, name in enumerate(LATENTS)}


def explain(top: Path, out: Path, *flags: str) -> dict[int, Explanation]:
    run(parse(ExplainConfig, "", ["run", "--top", str(top), "--out", str(out), *flags]), solo())
    return read_explanations(out)


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "top"
    return written.write_top(path, written.sentences(), [fires for fires, _ in LATENTS.values()], n=20)


@pytest.fixture(scope="module")
def explained(top: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Explanation]:
    return explain(top, tmp_path_factory.mktemp("explained") / "explanations")


@pytest.mark.parametrize("name", LATENTS)
def test_known_latents_get_their_meaning(explained: dict[int, Explanation], name: str) -> None:
    assert explained[INDEX[name]].title.startswith(LATENTS[name][1])


def test_every_latent_has_one_and_its_parts_are_whole(explained: dict[int, Explanation]) -> None:
    assert list(explained) == list(range(len(LATENTS)))
    for latent, found in explained.items():
        if latent == INDEX["never"]:
            assert (found.state, found.reason, found.title, found.score) == ("failed", "never fired", "", None)
            continue
        assert found.state == "valid"
        assert 1 <= len(found.title.split()) <= MAX_TITLE_WORDS
        assert found.explanation.endswith(".")
        assert (found.method, found.model, found.certainty) == ("token_statistics", "", None)
        assert set(found.details) == {"fires_on", "tokens", "words", "topic", "sentences", "score"}
        json.dumps(found.details, allow_nan=False)


def test_scores_tell_good_labels_from_empty_ones(explained: dict[int, Explanation]) -> None:
    scores = {name: explained[latent].score for name, latent in INDEX.items()}
    for name in ("one word", "a word behind another", "two words", "a sign", "years", "numbers", "The at the start"):
        assert scores[name] > 0.85
    for name in ("a function word", "the full stop"):  # true of the latent, but in most sentences
        assert 0.5 <= scores[name] < 0.75
    assert scores["the first word"] == 0.5
    assert scores["in one sentence"] is None
    assert "Too few sentences" in explained[INDEX["in one sentence"]].explanation


def test_score_is_the_balanced_accuracy_on_sentences_not_shown(top: Path, explained: dict[int, Explanation]) -> None:
    """The word is counted by hand in the odd ranks and in the sentences drawn."""
    latent = INDEX["two words"]
    opened = open_top(top)
    shown, held_out = split(opened.sentences(latent))
    assert not {s.text for s in shown} & {s.text for s in held_out}
    told = explained[latent].details["score"]

    def holds(text: str) -> bool:
        return bool({"she", "her"} & {word.strip('.,;:!?"').lower() for word in text.replace("'", " ").split()})

    own = {s.sentence_id for s in opened.sentences(latent)}
    others = [s.text for s in opened.pool() if s.sentence_id not in own]  # fewer than 1,000, so all of them
    assert told["held_out"] == len(held_out)
    assert told["found"] == sum(holds(s.text) for s in held_out)
    assert told["others"] == len(others)
    assert told["others_found"] == sum(map(holds, others))
    expected = (told["found"] / told["held_out"] + 1 - told["others_found"] / told["others"]) / 2
    assert explained[latent].score == pytest.approx(expected, abs=1e-4)


def test_words_apart_follow_monroe(tmp_path: Path) -> None:
    """z of a word against the formula written out: log-odds ratio with prior counts, over its standard deviation."""
    topics = [written.where(topic, written.everywhere) for topic in ("bread", "chess", "planets", "football")]
    opened = open_top(written.write_top(tmp_path / "top", written.sentences(), topics, n=60))
    rest = [PoolSentence(s.sentence_id, s.text, s.label) for s in written.sentences()]
    backend = TokenStatistics(opened, rest, 100, 0)
    everywhere = Counter(word for s in rest for word in set(units_of(s.text).folded))
    total, checked = sum(everywhere.values()), 0
    for explanation in backend.explain(range(4)):
        shown, _ = split(opened.sentences(explanation.latent))
        here = Counter(word for s in shown for word in set(units_of(s.text).folded))
        n = sum(here.values())
        for entry in explanation.details["words"]:
            word = entry["word"].lower()
            a = PRIOR_WORDS * everywhere[word] / total
            y, rest, n_rest = here[word], everywhere[word] - here[word], total - n
            odds_here, odds_rest = (y + a) / (n + PRIOR_WORDS - y - a), (rest + a) / (n_rest + PRIOR_WORDS - rest - a)
            z = (math.log(odds_here) - math.log(odds_rest)) / math.sqrt(1 / (y + a) + 1 / (rest + a))
            assert entry["z"] == pytest.approx(z, abs=0.01)
            assert entry["sentences"] == y
            checked += 1
    assert checked > 5


def test_topic_needs_enough_labels_that_agree(tmp_path: Path) -> None:
    sentences = written.sentences(3000)
    war = written.where("war", written.on("the"))
    some_labels = [s if s.sentence_id % 4 else s._replace(label=None) for s in sentences]
    no_labels = [s._replace(label=None) for s in sentences]
    one_label = [s._replace(label="text") for s in sentences]  # a label that all sentences share says nothing
    for name, corpus, topic in (("some", some_labels, "war"), ("none", no_labels, None), ("one", one_label, None)):
        fires = [
            lambda s, i, ids={s.sentence_id for s in sentences if s.label == "war"}: (
                3.0 if s.sentence_id in ids and s.tokens[i].strip() == "the" else 0.0
            ),
            written.on("the"),
        ]
        found = explain(written.write_top(tmp_path / name, corpus, [*fires, war], n=20), tmp_path / f"{name}-out")
        details = found[0].details["topic"]
        assert (details and details["name"]) == topic
        assert found[1].details["topic"] is None


def test_same_flags_same_bytes_and_run_again_is_left_alone(top: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        explain(top, tmp_path / name)
    first, second = ((tmp_path / name / "explanations.jsonl.gz").read_bytes() for name in ("a", "b"))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    before = (tmp_path / "a" / "explanations.jsonl.gz").stat().st_mtime_ns
    explain(top, tmp_path / "a")
    assert (tmp_path / "a" / "explanations.jsonl.gz").stat().st_mtime_ns == before
    manifest = open_artifact(tmp_path / "a", "explanations").manifest
    assert manifest.counts == {"latents": len(LATENTS), "valid": len(LATENTS) - 1, "failed": 1}
    assert manifest.provenance["sae_hash"] == "written"


def test_command_line(top: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "interpretability.explain", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)

    done = call("run", "--top", str(top), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert f"{len(LATENTS) - 1} latents explained by token_statistics, 1 failed" in done.stderr
    assert len(read_explanations(tmp_path / "out")) == len(LATENTS)
    wrong = call("run", "--top", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other"))
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert "no such folder" in wrong.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("inputs"), random_texts(60))


def test_corpus_is_what_sentences_are_compared_with(top: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", random_texts(60))
    with pytest.raises(ValueError, match="corpus_hash"):
        explain(top, tmp_path / "out", "--corpus", str(corpus))
    assert not (tmp_path / "out").exists()
    opened = open_top(top)
    assert sentences_to_compare(opened, None) == opened.pool()


def test_top_sentences_of_a_real_stage_are_read(folders: Folders, tmp_path: Path) -> None:
    from interpretability.top_sentences import TopSentencesConfig
    from interpretability.top_sentences import run as find_top

    flags = [*folders.flags(), "--out", str(tmp_path / "top"), "--device", "cpu", "--threads", "1"]
    find_top(parse(TopSentencesConfig, "", flags), solo())
    found = explain(tmp_path / "top", tmp_path / "explanations", "--corpus", str(folders.corpus))
    states = Counter(explanation.state for explanation in found.values())
    assert states["failed"] == open_artifact(tmp_path / "top").manifest.counts["dead_latents"] >= 2
    assert states["valid"] > 40
    without_max = parse(TopSentencesConfig, "", [*flags, "--out", str(tmp_path / "mean"), "--aggregations", "mean"])
    find_top(without_max, solo())
    with pytest.raises(ValueError, match="need the aggregation max, found mean"):
        explain(tmp_path / "mean", tmp_path / "never")


def test_tokens_are_mapped_to_whole_words() -> None:
    tokens = ["Un", "happ", "ily", ",", " the", " sol", "diers", "'", " 12", ".", "5", "\n", " don", "'t", " é", "té"]
    units = units_of("".join(tokens))
    assert units.surfaces == ["Unhappily", ",", "the", "soldiers", "'", "12.5", "don't", "été"]
    fired = firings(tokens, [0, 1, 3, 0, 0, 0, 2, 0, 1, 0, 4, 9, 0, 1, 0, 1])
    assert [(units.surfaces[f.unit], f.activation, f.token, f.shard) for f in fired] == [
        ("Unhappily", 3, "ily", "end"),
        ("soldiers", 2, "diers", "end"),
        ("12.5", 4, "5", "end"),
        ("don't", 1, "'t", "end"),
        ("été", 1, "té", "end"),
    ]
    assert firings(["", " a"], [1.0, 0.0]) == []
    assert units_of(" \n ").surfaces == []


def test_kinds_of_words() -> None:
    units = units_of('In 1980 NASA told Mr. Tomasz: "We saw max_iter and ValueError 3.5 times", I think')
    found = {surface: kinds_of(units, i) for i, surface in enumerate(units.surfaces) if kinds_of(units, i)}
    assert found == {
        "1980": ("number", "year"), "NASA": ("capitals",), "Mr": ("name",), "max_iter": ("identifier",),
        "ValueError": ("identifier",), "3.5": ("number",),
    }  # fmt: skip
    sentences = [units_of("Paris is big"), units_of("I like Paris"), units_of("The big Big big")]
    assert spellings({"paris", "big"}, sentences) == {"paris": "Paris", "big": "big"}
    assert akin("soldier", "soldiers")
    assert akin("walked", "walking")
    assert akin("city", "cities")
    for a, b in (("war", "warm"), ("bread", "brave"), ("chess", "chest"), ("centre", "centimetres")):
        assert not akin(a, b)


def test_presence_in_a_sample_equals_looking_at_each_sentence() -> None:
    sentences = [units_of(text) for text in random_texts(80, longest=6)]
    sample = Sample(sentences)
    patterns = {pattern for units in sentences for i in range(len(units.folded)) for pattern in patterns_at(units, i)}
    patterns |= {Pattern("start", ("s",)), Pattern("end", ("r",)), Pattern("inside", ("e",)), Pattern("word", ("war", "the"))}
    patterns |= {Pattern("word", ("nowhere",)), Pattern("kind", ("name",))}
    assert {pattern.kind for pattern in patterns} >= {"after_word", "before_word", "first_word", "first", "last", "kind"}
    for pattern in patterns:
        expected = sum(1 << i for i, units in enumerate(sentences) if pattern.present(units))
        assert sample.presence(pattern).mask == expected, pattern
    words = [word for units in sentences for word in units.surfaces]
    assert sample.presence(Pattern("end", ("r",))).units == sum(word.endswith("r") for word in words)
    assert sample.base(Pattern("word", ("nowhere",))) == 0.5 / (len(words) + 1)


def test_worth_of_a_pattern() -> None:
    assert Found(Pattern("word", ("war",)), 0.5, 0.5).worth == 0
    rare, common = Found(Pattern("word", ("war",)), 0.9, 0.001), Found(Pattern("word", ("the",)), 0.9, 0.1)
    assert rare.worth == pytest.approx(0.9 * (0.9 * math.log2(900) + 0.1 * math.log2(0.1 / 0.999)))
    assert rare.worth > common.worth > Found(Pattern("after", ("the",)), 0.9, 0.1).worth


def test_score_by_hand() -> None:
    sample = Sample([units_of(text) for text in ("a war", "a peace", "war again", "calm", "mine: war")])
    found = score(Pattern("word", ("war",)), [units_of("war"), units_of("the war"), units_of("a feud")], sample, 0b01111)
    assert found is not None
    assert (found.found, found.held_out, found.others_found, found.others) == (2, 3, 2, 4)
    assert found.score == pytest.approx((2 / 3 + 1 - 2 / 4) / 2)
    assert score(Pattern("first"), [], sample, 0b1) is None
    assert score(Pattern("first"), [units_of("war")], sample, 0) is None


def sentence(rank: int, text: str) -> TopSentence:
    return TopSentence(0, "max", rank, 1.0, rank, "", None, text, [text], [1.0])


def test_a_text_that_comes_twice_counts_once() -> None:
    shown, held_out = split([sentence(rank, text) for rank, text in enumerate(["a", "a", "b", "c", "b", "d"])])
    assert [s.rank for s in shown] == [0, 3]
    assert [s.rank for s in held_out] == [2, 5]

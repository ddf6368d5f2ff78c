"""Scores: examples that nobody saw, formulas by hand, baselines at chance, and answers that are none."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.artifact import verify
from core.cli import parse
from interpretability.batch_api import DEFAULT_MODEL
from interpretability.explain import ExplainConfig
from interpretability.explain import run as run_explain
from interpretability.prompts import MalformedReply
from interpretability.records import Named, TopSentences, open_top
from interpretability.score import SHUFFLED, ScoreConfig, interval, run, summary_of
from interpretability.token_statistics import split
from interpretability.top_sentences import TopSentencesConfig
from interpretability.top_sentences import run as run_top
from interpretability.trials import TESTS, Example, Trial, TrialMaker, shuffled
from interpretability.word_judge import judge, marked_words, named_by
from tests import written_latents as written
from tests.fake_batches import BatchServer
from tests.interp_folders import make_folders, random_texts, solo


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    # No text twice: the rows are random, so equal texts would fire differently, as no model's do.
    folders = make_folders(root, list(dict.fromkeys(random_texts(450, longest=20)))[:400])
    argv = [*folders.flags(), "--out", str(root / "top"), "--n-sentences", "16", "--sample-sentences", "100", "--device", "cpu"]
    run_top(parse(TopSentencesConfig, "", argv), solo())
    return root / "top"


@pytest.fixture(scope="module")
def explanations(top: Path) -> Path:
    out = top.parent / "explanations"
    run_explain(parse(ExplainConfig, "", ["run", "--top", str(top), "--out", str(out)]), solo())
    return out


def config(top: Path, explanations: Path, out: Path, *flags: str) -> ScoreConfig:
    return parse(ScoreConfig, "", ["--top", str(top), "--explanations", str(explanations), "--out", str(out), *flags])


def every_trial(opened: TopSentences) -> Iterator[Trial]:
    maker = TrialMaker(opened, 6, 0)
    for latent in range(opened.n_latents):
        yield from maker.trials(latent, TESTS)


def activations(opened: TopSentences, latent: int) -> dict[str, list[float]]:
    """Per-token activations of every sentence of which they are known, by text."""
    known = {s.text: s.activations for s in (*opened.sentences(latent), *opened.levels(latent))}
    for sentence in opened.background():
        values = [0.0] * len(sentence.tokens)
        for found, position, value in zip(sentence.latents, sentence.positions, sentence.activations, strict=True):
            if found == latent:
                values[position] = float(value)
        known.setdefault(sentence.text, values)
    return known


def test_examples_are_held_out_and_true(top: Path) -> None:
    opened = open_top(top)
    seen = dict.fromkeys(TESTS, 0)
    for trial in every_trial(opened):
        shown, _ = split(opened.sentences(trial.latent))
        known = activations(opened, trial.latent)
        seen[trial.test] += 1
        for example in trial.examples:
            assert example.text not in {sentence.text for sentence in shown}
            values = known[example.text]
            marked = [values[i] for i in example.marks]
            assert marked
            if trial.test == "intruder":
                assert (max(values) > 0) == (example.truth == 0)
            elif trial.test == "fuzzing":
                assert max(values) > 0
                assert all(marked) if example.truth else not any(marked)
                assert len(example.marks) <= sum(value > 0 for value in values)
            else:
                assert (max(values) > 0) == (example.truth > 0)
        if trial.test == "intruder":
            assert sorted(example.truth for example in trial.examples) == [0, 0, 0, 0, 1]
    assert min(seen.values()) > 20


def test_trials_do_not_depend_on_their_neighbours(top: Path) -> None:
    opened = open_top(top)
    alone = TrialMaker(opened, 6, 0).trials(3, ["fuzzing"])
    assert alone[0] in TrialMaker(opened, 6, 0).trials(3, TESTS)
    assert TrialMaker(opened, 6, 1).trials(3, ["fuzzing"]) != alone


def example(text: str, marks: list[int], truth: int) -> Example:
    tokens = [word if i == 0 else f" {word}" for i, word in enumerate(text.split())]
    return Example(text, tokens, marks, truth)


STORM, SHIP, BREAD = example("a storm at sea", [1], 1), example("the ship sank", [1], 1), example("fresh bread", [1], 0)


def test_scores_by_hand() -> None:
    detection = Trial("detection", 0, [STORM, SHIP, BREAD, BREAD])
    assert detection.score([1, 0, 0, 1]) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert detection.score([1, 1, 0, 0]) == 1
    assert detection.score([0, 0, 1, 1]) == 0
    assert Trial("detection", 0, [STORM]).score([1]) is None
    rubric = Trial("rubric", 0, [STORM._replace(truth=10), SHIP._replace(truth=2), BREAD])
    assert rubric.score([3, 1, 1]) == pytest.approx((2 - 1) / 3)
    assert rubric.grades([3, 1, 0]) == {10: [3], 2: [1], 0: [0]}
    intruder = Trial("intruder", 0, [BREAD, SHIP])
    assert (intruder.score([2]), intruder.score([1])) == (1, 0)


def test_what_a_judge_is_shown() -> None:
    assert STORM.marked == "a<< storm>> at sea"
    shown = Trial("fuzzing", 0, [STORM, BREAD]).user('storms "at sea"').splitlines()
    assert json.loads(shown[0].removeprefix("Description: ")) == 'storms "at sea"'
    assert json.loads(shown[1]) == {"sentence": 1, "text": "a<< storm>> at sea"}
    assert "<<" not in Trial("detection", 0, [STORM]).user("x")
    assert "Description" not in Trial("intruder", 0, [STORM]).user("x")


@pytest.mark.parametrize(("test", "reply", "problem"), [
    ("detection", "[0, 1]", "no JSON object"),
    ("detection", '{"answers": [0]}', "no list of 2"),
    ("detection", '{"answers": [0, 1, 1]}', "no list of 2"),
    ("detection", '{"answers": [0, 2]}', "others than 0 to 1"),
    ("detection", '{"answers": [0, true]}', "others than 0 to 1"),
    ("detection", '{"answers": [0, 1.0]}', "others than 0 to 1"),
    ("detection", '{"answers": "01"}', "no list of 2"),
    ("rubric", '{"answers": [0, 4]}', "others than 0 to 3"),
    ("intruder", '{"answers": [0]}', "others than 1 to 2"),
    ("intruder", '{"answers": [1, 2]}', "no list of 1"),
])  # fmt: skip
def test_answers_that_are_none(test: str, reply: str, problem: str) -> None:
    with pytest.raises(MalformedReply, match=problem):
        Trial(test, 0, [STORM, BREAD]).parse(reply)  # type: ignore[arg-type]


def test_answers_that_are() -> None:
    assert Trial("detection", 0, [STORM, BREAD]).parse('I see. {"answers": [1, 0]}') == [1, 0]
    assert Trial("rubric", 0, [STORM, BREAD]).parse('{"answers": [3, 0]}') == [3, 0]
    assert Trial("intruder", 0, [STORM, BREAD]).parse('{"answers": [2]}') == [2]


def test_the_word_judge() -> None:
    assert named_by('Fires on "storm" or "Ship": 80 %') == Named({"storm", "ship"})
    assert named_by("ships in heavy weather") == Named({"ships", "heavy", "weather"})
    assert named_by('words like "un-", "-ing" or "well-being". It raises "else".') == Named(
        {"well", "-", "being"}, ("un",), ("ing",)
    )
    assert named_by('At sea. It names "storm". It raises "else".') == Named({"storm"})
    beginnings = named_by('"un-"')
    assert any(map(beginnings.has, {"the", "unhappy"}))
    assert not any(map(beginnings.has, {"run", "-"}))
    cut = Example("unsinkable ships", ["un", "sink", "able", " ships"], [1], 1)
    assert marked_words(cut) == {"unsinkable"}
    trial = Trial("detection", 0, [STORM, SHIP, BREAD])
    assert judge(trial, '"storm", "sea"') == [1, 0, 0]
    assert judge(trial._replace(test="fuzzing"), '"sea", "ship"') == [0, 1, 0]
    assert judge(trial._replace(test="rubric"), '"storm", "ship" with bread') == [3, 3, 1]
    others = [example(f"the storm {word}", [1], 0) for word in ("came", "went", "rose", "fell")]
    assert judge(Trial("intruder", 0, [*others[:2], BREAD, *others[2:]]), "") == [3]


def test_nobody_keeps_its_own_explanation() -> None:
    own = {latent: str(latent) for latent in range(50)}
    drawn = shuffled(own, 0)
    assert sorted(drawn.values()) == sorted(own.values())
    assert all(drawn[latent] != own[latent] for latent in own)
    assert shuffled({1: "alone"}, 0) == {}


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    """Of 200 samples of 30 draws, the 95 % interval holds the true mean in 88 % or more."""
    import random

    draw, held = random.Random(1), 0
    for i in range(200):
        found = interval([draw.random() for _ in range(30)], i)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.5 <= found.high
    assert 176 <= held < 200
    assert interval([], 0) == (None, None, None)
    assert interval([0.7], 0) == (0.7, 0.7, 0.7)


def test_a_table_with_baseline(top: Path, explanations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(top, explanations, tmp_path / "scores", "--sample", "0"), solo())
    verify(tmp_path / "scores")
    assert "| detection | token_statistics |" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert {row["explainer"] for row in summary["results"]} == {"token_statistics", SHUFFLED, "(latent alone)"}
    for result in summary["results"]:
        mine = [r["score"] for r in rows if (r["test"], r["explainer"]) == (result["test"], result["explainer"])]
        assert result["mean"] == pytest.approx(statistics.fmean(mine))
        assert result["low"] <= result["mean"] <= result["high"]
    again = tmp_path / "again"
    run(config(top, explanations, again, "--sample", "0"), solo())
    assert (again / "scores.jsonl").read_bytes() == (tmp_path / "scores" / "scores.jsonl").read_bytes()


def test_a_language_model_judges(top: Path, explanations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that calls every second sentence firing gets what it should; one that rambles counts as failed."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")

    def answer(custom_id: str, prompt: str) -> str:
        n = sum(line.startswith('{"sentence"') for line in prompt.splitlines())
        return json.dumps({"answers": [i % 2 for i in range(n)]}) if int(custom_id.rsplit("q", 1)[1]) % 5 else "I cannot say."

    with BatchServer(answer=answer) as server:
        flags = ("--backend", "anthropic", "--base-url", server.url, "--yes", "--poll-s", "0.01", "--tests", "detection")
        for _ in range(2):
            with pytest.raises(ValueError, match=r"answers failed .*--max-failed-share 0.1"):
                run(config(top, explanations, tmp_path / "scores", *flags, "--latents", "0-9"), solo())
        run(config(top, explanations, tmp_path / "scores", *flags, "--latents", "0-9", "--max-failed-share", "0.5"), solo())
    rows = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    assert len(rows) >= 10
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["judge"] == f"anthropic {DEFAULT_MODEL}"
    for i, row in enumerate(rows):
        if i % 5 == 0:
            assert (row["score"], row["answers"]) == (None, None)
            assert row["reason"].startswith("malformed reply: holds no JSON")
            continue
        truth = row["truth"]
        right = [sum(j % 2 == t for j, t in enumerate(truth) if t == kind) / truth.count(kind) for kind in (0, 1)]
        assert row["score"] == pytest.approx(sum(right) / 2)
    assert sum(r["failed"] for r in summary_of(rows, 0)["results"]) == -(-len(rows) // 5)


def test_refusals(top: Path, explanations: Path, tmp_path: Path) -> None:
    old = written.write_top(tmp_path / "old", written.sentences(300), [written.on("the"), written.on("she", "her")], n=10)
    other = tmp_path / "other"
    run_explain(parse(ExplainConfig, "", ["run", "--top", str(old), "--out", str(other)]), solo())
    with pytest.raises(ValueError, match="holds no background sentences"):
        run(config(old, other, tmp_path / "a"), solo())
    with pytest.raises(ValueError, match="sae_hash is") as refused:
        run(config(top, other, tmp_path / "b"), solo())
    assert str(open_top(top).provenance["sae_hash"]) in str(refused.value)
    with pytest.raises(ValueError, match="--examples at least 3"):
        config(top, explanations, tmp_path / "c", "--examples", "2")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()

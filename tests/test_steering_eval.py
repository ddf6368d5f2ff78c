"""The steering evaluation: each figure against a count by hand, the choice of strengths against the prompts it may look at."""

import json
import math
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch

import inference.complete
import inference.steering_eval
from core.artifact import open_artifact
from core.cli import parse
from inference.measuring.steered_texts import (
    Panel,
    continued,
    first_tokens,
    following_tokens,
    hooks_for,
    label_words,
    promoted_tokens,
    pushed,
)
from inference.measuring.steering_report import as_table, best_strengths, grouped, interval, summarise
from inference.session import Session, open_session
from inference.steering import Edit, Recipe
from inference.steering_eval import TOP_K, EvalConfig, read_prompts, to_measure, typical_length
from llama3.generate import Sampling
from tests.tiny import tiny_llama
from tests.tiny_features import Features, alone, tiny_sae, write_features

PROMPTS = ["the storm", "she read", "a", "rain fell on the"]
SAMPLING = Sampling(max_new_tokens=6, temperature=1.0, top_k=TOP_K, top_p=1.0, seed=0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("eval")
    model = tiny_llama(folder / "model")
    return write_features(folder, model, tiny_sae(model, "layers.1.resid_post"))


@pytest.fixture(scope="module")
def config(paths: Features, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    folder = tmp_path_factory.mktemp("out")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    flags = [*paths.flags, "--out", str(folder / "steering"), "--features", "3", "--lengths", "0.5", "3", "--directions", "2"]
    flags += ["--prompts", str(folder / "prompts.txt"), "--max-new-tokens", "6", "--resamples", "50"]
    return parse(EvalConfig, "", flags)


@pytest.fixture(scope="module")
def session(config: EvalConfig) -> Session:
    return open_session(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def panel(session: Session) -> Panel:
    features = session.needs_features()
    chosen = tuple(to_measure(features, 3))
    wanted = tuple(label_words(features.label(latent)) for latent in chosen)
    ids = tuple(tuple(session.tokenizer.encode(prompt, bos=True)) for prompt in PROMPTS)
    return Panel(session, chosen, wanted, ids, SAMPLING)


def recipes(session: Session, strength: float, latents: tuple[int, ...]) -> list[Recipe]:
    sae = session.needs_features().sae
    return [Recipe((Edit(latent=latent, strength=strength),), sae.weights_hash) for latent in latents]


def test_what_is_read_is_what_one_text_at_a_time_shows(session: Session, panel: Panel) -> None:
    """Firing, words, tokens and loss of a batch of padded rows, against each text alone with the session's own reader."""
    one = recipes(session, 2.0, panel.chosen)
    found = panel.write(one)
    which = [m for m in range(3) for _ in PROMPTS]
    rows = [list(prompt) for _ in range(3) for prompt in panel.prompts]
    texts = continued(session, rows, SAMPLING, hooks_for(panel.features, one, which, [len(row) for row in rows]))
    for b, (row, text) in enumerate(zip(rows, texts, strict=True)):
        m, p = divmod(b, len(PROMPTS))
        reading = session.read(text)
        assert found.tokens[m, p] == len(text) - len(row)
        for f, latent in enumerate(panel.chosen):
            assert found.fired[m, p, f] == sum(value > 0 for value in reading.of(latent)[len(row) :])
            letters = "".join(c if c in ascii_lowercase else " " for c in session.tokenizer.decode(text[len(row) :]).lower())
            assert found.words[m, p, f] == sum(panel.wanted[f].has(word) for word in letters.split() if len(word) > 1)
        with torch.no_grad():
            scores = session.model(torch.tensor([text]))[0].log_softmax(-1)
        loss = -sum(float(scores[t - 1, text[t]]) for t in range(len(row), len(text)))
        assert found.loss[m, p] == pytest.approx(loss, abs=1e-3)
    assert float(found.fired.sum()) > 0


def test_next_tokens_are_the_steered_model_s(session: Session, panel: Panel) -> None:
    texts = [[*panel.prompts[0], 40, 41], [*panel.prompts[3], 50]]
    starts = [len(panel.prompts[0]), len(panel.prompts[3])]
    one = recipes(session, 3.0, panel.chosen[:2])
    found = panel.next_tokens(one, texts, starts)
    steering = session.needs_features().steering
    for m, recipe in enumerate(one):
        chances = []
        for text, start in zip(texts, starts, strict=True):
            hooks = steering.hooks_for([recipe], [start])
            assert hooks is not None
            with torch.no_grad(), session.model.hooks(hooks(torch.arange(len(text))[None])):
                scores = session.model(torch.tensor([text]))[0]
            chances += [scores[t - 1].softmax(-1) for t in range(start, len(text))]
        torch.testing.assert_close(found[m], torch.stack(chances).mean(0)[: session.tokenizer.n_vocab], atol=1e-6, rtol=1e-4)
    assert found.sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_controls_are_as_long_as_the_edit(session: Session) -> None:
    features = session.needs_features()
    edit = Edit(latent=2, strength=1.7)
    size = edit.strength * float(features.max_values[2])
    vectors = torch.nn.functional.normalize(torch.randn(3, features.sae.cfg.d_model), dim=1) * size
    x, positions = torch.randn(3, 4, features.sae.cfg.d_model), torch.arange(4).expand(3, 4)
    steered = features.steering.hooks_for([Recipe((edit,), features.sae.weights_hash)] * 3, [2] * 3)
    assert steered is not None
    moved = [source(positions)[features.site](x) - x for source in (steered, pushed(features, vectors))]
    torch.testing.assert_close(moved[0].norm(dim=-1), moved[1].norm(dim=-1))
    assert float(moved[1][:, 0].norm()) == 0, "the sink was pushed"


@pytest.mark.parametrize(
    ("label", "yes", "no"),
    [
        ('"nobody"', ["nobody"], ["body", "nobodys"]),
        ('words beginning "lin-": linear', ["linear", "line"], ["words", "beginning", "online"]),
        ('words ending "-ing"', ["sing", "running"], ["ingot", "words"]),
        ('"copy", "view": array', ["copy", "view"], ["array", "copying"]),
        ("storms at sea", ["storms", "sea"], ["at"]),
        ("words like unequal, uncovers", ["unequal", "uncovers"], ["words", "like"]),
        ('"`": header', ["header"], ["the"]),
    ],
)
def test_words_of_a_label(label: str, yes: list[str], no: list[str]) -> None:
    wanted = label_words(label)
    assert all(wanted.has(word) for word in yes)
    assert not any(wanted.has(word) for word in no)


def test_first_tokens_begin_the_words(session: Session) -> None:
    tokenizer = session.tokenizer
    table = first_tokens([label_words('"storm"'), label_words('words beginning "st-"')], tokenizer)
    assert table[tokenizer.encode(" storm")[0], 0] == table[tokenizer.encode(" Storm")[0], 0] == 1
    for token in table[:, 1].nonzero()[:, 0].tolist():
        assert tokenizer.decode([token]).strip().lower().startswith("st")
    session_features = session.needs_features()
    promoted = promoted_tokens(session_features, (2, 5), tokenizer)
    assert {tokenizer.pieces([i])[0] for i in promoted[:, 1].nonzero()[:, 0].tolist()} <= {" rain", " storm"}


def test_following_tokens_stand_behind_the_peaks(session: Session) -> None:
    tokenizer, features = session.tokenizer, session.needs_features()
    table = following_tokens(features, (2, 5), tokenizer)
    for column, latent in enumerate((2, 5)):
        behind = set()
        for sentence in features.top.sentences(latent):
            peak = max(range(len(sentence.tokens)), key=lambda t: sentence.activations[t])
            behind |= set(sentence.tokens[peak + 1 : peak + 2])
        marked = {tokenizer.pieces([i])[0] for i in table[:, column].nonzero()[:, 0].tolist()}
        assert marked == behind
    assert 0 < int(table.sum()) < table.numel()


# Choosing and summing up


def row(latent: int, length: float, prompts: str, steered: float, random: float, perplexity: float = 10.0) -> dict[str, Any]:
    def measured(firing: float, surprise: float = 10.0) -> dict[str, float]:
        names = ("firing", "words", "next_token", "promoted", "follows")
        return dict.fromkeys(names, firing) | {"perplexity": surprise}

    kinds = {"baseline": measured(0.01), "random": measured(random), "others": measured(random)}
    base = {"latent": latent, "label": "x|y", "length": length, "strength": length * 3, "prompts": prompts}
    return base | kinds | {"steered": measured(steered, perplexity)}


ROWS = [
    row(0, 0.5, "odd", 0.10, 0.02), row(0, 1.0, "odd", 0.20, 0.02), row(0, 2.0, "odd", 0.90, 0.02, 99.0),
    row(0, 0.5, "even", 0.50, 0.02), row(0, 1.0, "even", 0.30, 0.02, 21.0), row(0, 2.0, "even", 0.80, 0.02, 99.0),
    row(0, 0.5, "all", 0.30, 0.02), row(0, 1.0, "all", 0.25, 0.02, 15.0), row(0, 2.0, "all", 0.85, 0.02, 99.0),
    row(1, 0.5, "odd", 0.40, 0.02, 99.0), row(1, 1.0, "odd", 0.40, 0.02, 99.0), row(1, 2.0, "odd", 0.40, 0.02, 99.0),
    row(1, 0.5, "even", 0.40, 0.02, 99.0), row(1, 1.0, "even", 0.40, 0.02, 99.0), row(1, 2.0, "even", 0.40, 0.02, 99.0),
    row(1, 0.5, "all", 0.40, 0.02, 99.0), row(1, 1.0, "all", 0.40, 0.02, 99.0), row(1, 2.0, "all", 0.40, 0.02, 99.0),
]  # fmt: skip


def test_the_best_strength_is_the_largest_within_the_limit() -> None:
    assert best_strengths(ROWS, 2.0) == {"0": 3.0}, "a feature that is too dear at every length has none"
    assert best_strengths(ROWS, 1.4) == {"0": 1.5}
    assert best_strengths(ROWS, 20.0) == {"0": 6.0, "1": 6.0}
    stronger = [row(5, 0.5, "all", 0.93, 0.02)]
    assert list(best_strengths([*ROWS, *stronger], 2.0)) == ["5", "0"], "the strongest effect first"


def test_strengths_are_judged_by_the_prompts_that_did_not_choose_them() -> None:
    """At most 2 times the perplexity: the odd prompts choose 1.0, which the even ones judge 0.30; the even ones choose 0.5,
    which the odd ones judge 0.10."""
    *lengths, (name, best) = grouped(ROWS, 2.0)
    assert [length for length, _ in lengths] == [0.5, 1.0, 2.0]
    assert all(found["prompts"] == "all" for _, rows in lengths for found in rows)
    assert name == "best"
    assert best[0]["steered"]["firing"] == pytest.approx((0.30 + 0.10) / 2)
    assert best[0]["steered"]["perplexity"] == pytest.approx((21.0 + 10.0) / 2)
    assert best[1]["steered"] == best[1]["random"] == best[1]["baseline"], "a feature without a strength is not steered"


def test_summary_is_of_all_prompts() -> None:
    groups = grouped(ROWS, 2.0)
    summary = summarise(groups, 200, 0)
    assert [one["length"] for one in summary] == [0.5, 1.0, 2.0, "best"]
    assert summary[0]["steered_firing_mean"] == pytest.approx(0.35)
    best = summary[-1]
    assert best["features"] == 2
    assert best["steered_firing_mean"] == pytest.approx((0.20 + 0.01) / 2)
    assert best["firing_over_random"][0] == best["firing_over_random_mean"][0] == pytest.approx(0.09)
    table = as_table(summary, ROWS, best_strengths(ROWS, 2.0), 2.0)
    assert table.count("\n| best |") == 6
    assert "\n| 0 | x\\|y | 3 | 2.00 -> 25.00 |" in table
    assert "nan" not in table


def test_intervals_cover_the_median() -> None:
    """Of 200 samples from a known distribution the interval holds the true median in about 95 %."""
    random = np.random.default_rng(0)
    intervals = [interval(np.median, random.exponential(size=60), 300, seed) for seed in range(200)]
    held = np.mean([low <= math.log(2) <= high for _, low, high in intervals])
    assert 0.90 <= held <= 0.99


# The folder


def test_the_folder_agrees_with_itself(config: EvalConfig, session: Session, panel: Panel, paths: Features) -> None:
    inference.steering_eval.run(config, alone())
    artifact = open_artifact(config.out, "steering")
    rows = [json.loads(line) for line in artifact.file("steering.jsonl").read_text().splitlines()]
    assert [(r["latent"], r["length"], r["prompts"]) for r in rows] == [
        (latent, length, half) for length in (0.5, 3.0) for latent in panel.chosen for half in ("odd", "even", "all")
    ]
    texts = continued(session, [list(prompt) for prompt in panel.prompts], SAMPLING, None)
    size, features = typical_length(session, texts), session.needs_features()
    assert rows[-1]["strength"] == pytest.approx(3 * size / float(features.max_values[panel.chosen[2]]))
    for place, prompts in ((9, slice(0, None, 2)), (10, slice(1, None, 2)), (11, slice(None))):  # at length 3
        records = rows[place::3]
        written = panel.write(
            [Recipe((Edit(latent=r["latent"], strength=r["strength"]),), features.sae.weights_hash) for r in records]
        )
        for f, record in enumerate(records):
            share = float(written.fired[f, prompts, f].sum() / written.tokens[f, prompts].sum())
            assert record["steered"]["firing"] == pytest.approx(share, rel=1e-5)
            others = [g for g in range(3) if g != f]
            share = float(written.fired[others, prompts, f].sum() / written.tokens[others, prompts].sum())
            assert record["others"]["firing"] == pytest.approx(share, rel=1e-5)
    summary = json.loads(artifact.file("steering.json").read_text())
    best = json.loads(artifact.file("best_strengths.json").read_text())
    groups = grouped(rows, config.max_perplexity_ratio)
    assert summary == json.loads(json.dumps(summarise(groups, config.resamples, config.seed)))
    assert best == best_strengths(rows, config.max_perplexity_ratio)
    assert artifact.file("steering.png").read_bytes().startswith(b"\x89PNG")
    inference.steering_eval.run(config, alone())  # finished: nothing to do
    flags = [*paths.flags, "--prompt", "x", "--strengths", str(config.out)]
    again = open_session(parse(inference.complete.CompleteConfig, "", flags), torch.device("cpu")).needs_features()
    assert dict(again.best_strengths) == {int(latent): strength for latent, strength in best.items()}
    assert list(again.best_strengths) == [int(latent) for latent in best], "the strongest effect first"


def test_an_interrupted_evaluation_keeps_its_lengths(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inference.steering_eval.run(config, alone())
    asked: list[list[float]] = []

    def measure(*arguments: Any) -> Any:
        asked.append(list(arguments[-1]))
        for found in whole(*arguments):
            yield found
            if len(asked) == 1:
                raise KeyboardInterrupt

    whole = inference.steering_eval.measure
    monkeypatch.setattr(inference.steering_eval, "measure", measure)
    again = replace(config, out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        inference.steering_eval.run(again, alone())
    inference.steering_eval.run(again, alone())
    assert asked == [[0.5, 3.0], [3.0]]
    one, other = open_artifact(config.out, "steering"), open_artifact(again.out, "steering")
    assert one.names == other.names
    assert all(one.file(name).read_bytes() == other.file(name).read_bytes() for name in one.names)
    assert {path.name for path in again.out.iterdir()} == {path.name for path in config.out.iterdir()}


def test_strengths_of_another_sae_are_refused(config: EvalConfig, paths: Features, tmp_path: Path) -> None:
    inference.steering_eval.run(config, alone())
    other = write_features(tmp_path, paths.model, tiny_sae(paths.model, "layers.1.resid_post", seed=4))
    flags = [*other.flags, "--prompt", "x", "--strengths", str(config.out)]
    with pytest.raises(ValueError, match="measured on the SAE"):
        open_session(parse(inference.complete.CompleteConfig, "", flags), torch.device("cpu"))


def test_a_prompt_beyond_the_context_leaves_no_folder(paths: Features, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the storm\n" + "word " * 100 + "\n")
    flags = [*paths.flags, "--out", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.txt")]
    with pytest.raises(ValueError, match=r"prompt 1 has .* tokens and the context holds 128"):
        inference.steering_eval.run(parse(EvalConfig, "", flags), alone())
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n")
    with pytest.raises(ValueError, match="two prompts or more, one a line; found 1"):
        read_prompts(path)
    path.write_text("one\n\ntwo\n")
    assert read_prompts(path) == ["one", "two"]
    assert len(read_prompts(None)) == 32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "1"], "--features: expected at least 2"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected at least 1"),
        (["--lengths", "nan"], "above 0, at most 100"),
        (["--lengths", "-1"], "above 0, at most 100"),
        (["--lengths", "0.5", "0.5"], "expected each once"),
        (["--max-perplexity-ratio", "nan"], "expected 1 or more; found nan"),
    ],
)
def test_flags_out_of_range(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(EvalConfig, "", ["--out", "x", *flags])

"""The workbench without its page: limits that hold whatever the client, both columns, finding features, what is shown."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from inference import views
from inference.finding import by_label, by_text, similar
from inference.handlers import BY_LABEL, BY_TEXT, N_SLOTS, N_STARTERS, NO_SLOTS, Controls, Handlers
from inference.limits import Knobs, split_prompts
from inference.session import InferenceConfig, Session, open_session
from inference.steering import Edit, Recipe
from inference.workbench import Row, Snapshot, checked_request, compare
from llama3 import complete
from tests.tiny import tiny_llama
from tests.tiny_features import LABELS, Features, tiny_sae, write_features

QUIET = Knobs(max_new_tokens=8, temperature=0.9, seed=5)
UNUSED = tuple(Controls()) * N_SLOTS


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("app")
    model = tiny_llama(folder / "model", max_seq_len=1024)
    return write_features(folder, model, tiny_sae(model, "layers.1.resid_post"))


@pytest.fixture(scope="module")
def session(paths: Features) -> Session:
    return open_session(
        InferenceConfig(model=str(paths.model), sae=paths.sae, top=paths.top, explanations=paths.explanations),
        torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def handlers(session: Session) -> Handlers:
    return Handlers(session, "plain")


def controls(*rows: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """What the page sends for its edit rows."""
    return tuple(value for row in (*rows, *[tuple(Controls())] * (N_SLOTS - len(rows))) for value in row)


def slots(*latents: int) -> tuple[int | None, ...]:
    return (*latents, *[None] * (N_SLOTS - len(latents)))


# Limits


def test_a_megabyte_is_refused_everywhere(handlers: Handlers) -> None:
    for text in ("x" * 2**20, "x\n" * 2**19):
        with pytest.raises(ValueError, match="8,000 characters"):
            handlers.generate(text, QUIET, NO_SLOTS, UNUSED)
        assert "300 characters" in handlers.find(BY_LABEL, text)
        assert "8,000 characters" in handlers.find(BY_TEXT, text)
        assert handlers.first(BY_LABEL, text) is None
        with pytest.raises(ValueError, match="64,000 characters"):
            handlers.applied(text)
        with pytest.raises(ValueError, match="8,000 characters"):
            handlers.chat([("user", text)], "", QUIET, NO_SLOTS, UNUSED)
        with pytest.raises(ValueError, match="8 lines of 80 characters"):
            handlers.generate("the storm", QUIET._replace(stop=text), NO_SLOTS, UNUSED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "new tokens must be a number from 1 to 512"),
        ({"max_new_tokens": 10**9}, "new tokens must be a number from 1 to 512"),
        ({"max_new_tokens": 2.5}, "whole number"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": -math.inf}, "top-p must be a number"),
        ({"repetition_penalty": None}, "repetition penalty must be a number"),
        ({"seed": True}, "seed must be a number"),
        ({"seed": 1e300}, "seed must be a number"),
        ({"top_k": 1001}, "top-k must be a number from 0 to 1000"),
        ({"top_k": 0.5}, "top-k must be a whole number"),
        ({"min_p": math.nan}, "min-p must be a number"),
        ({"stop": ["a"]}, "stop strings must be text"),
        ({"stop": "a\n" * 9}, "at most 8 stop strings"),
        ({"stop": "a" * 81}, "of 80 characters"),
    ],
)
def test_sampling_is_limited(handlers: Handlers, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(handlers.generate("the storm", QUIET._replace(**change), NO_SLOTS, UNUSED))


@pytest.mark.parametrize(
    ("latent", "row", "message"),
    [
        (48, (4, "add", "all"), "latents 0 to 47"),
        (-1, (4, "add", "all"), "latents 0 to 47"),
        (1e300, (4, "add", "all"), "out of range"),
        ("x", (4, "add", "all"), "whole number from 0"),
        (math.nan, (4, "add", "all"), "whole number from 0"),
        (3, (31, "add", "all"), "from -10 to 30"),
        (3, (math.nan, "add", "all"), "from -10 to 30"),
        (3, (1e38, "add", "all"), "from -10 to 30"),
        (3, (None, "add", "all"), "from -10 to 30"),
        (3, (4, "explode", "all"), "unknown mode"),
        (3, (4, ["add"], "all"), "unknown mode"),
        (3, (4, "add", "somewhere"), "positions must be"),
        (3, (4, "add", {"a": 1}), "positions must be"),
        (3, (4, "add", 10**30), "positions must be"),
    ],
)
def test_edits_are_limited(handlers: Handlers, latent: Any, row: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(handlers.generate("the storm", QUIET, slots(latent), controls(row)))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the prompt is empty"), (" \n\t\n", "the prompt is empty"), ("a\n" * 9, "at most 8 prompts"), (7, "must be text"),
     ("word " * 400, "context holds 1,024")],
)  # fmt: skip
def test_prompts_are_limited(handlers: Handlers, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(handlers.generate(text, QUIET, NO_SLOTS, UNUSED))


def test_stop_strings_are_lines() -> None:
    assert Knobs(stop="one\n\n \n\\n\\n\nA:\\t").checked().stop == ("one", "\n\n", "A:\t")
    assert Knobs().checked().stop == ()


def test_prompts_are_lines() -> None:
    assert split_prompts("  one \n\n two\r\nthree") == ["one", "two", "three"]


# Generation


def run(
    handlers: Handlers,
    prompts: str,
    slot: tuple[int | None, ...] = NO_SLOTS,
    row: tuple[Any, ...] = UNUSED,
    knobs: Knobs = QUIET,
) -> Snapshot:
    *_, last = handlers.generate(prompts, knobs, slot, row)
    return last


def test_columns_are_what_lone_runs_give(handlers: Handlers, session: Session) -> None:
    """Each column equals the plain `complete`, with and without the recipe's hooks."""
    prompts = ["the storm", "she read the letter"]
    last = run(handlers, "\n".join(prompts), slots(3, 7), controls((9, "add", "all"), (2.5, "clamp", "from 4")))
    sampling = QUIET.checked()
    assert [row.text for row in last.baseline] == complete(session.model, session.tokenizer, prompts, sampling)
    steering = session.needs_features().steering
    recipe = Recipe(
        (Edit(latent=3, strength=9.0), Edit(latent=7, strength=2.5, mode="clamp", positions=4)), steering.sae.weights_hash
    )
    hooks = steering.hooks_for([recipe] * 2, [row.prompt_length for row in last.baseline])
    assert last.steered is not None
    assert [row.text for row in last.steered] == complete(session.model, session.tokenizer, prompts, sampling, hooks)
    assert [row.text for row in last.steered] != [row.text for row in last.baseline]
    assert not last.running
    assert all(row.finished for row in (*last.baseline, *last.steered))


def test_no_edits_no_second_column(handlers: Handlers) -> None:
    assert run(handlers, "the storm").steered is None
    still = run(handlers, "the storm", slots(3), controls((0, "add", "all")))
    assert still.steered is None
    assert "No edit changes anything" in views.columns(handlers.session, still, None)


def test_the_context_bounds_the_answer(session: Session) -> None:
    request = checked_request(session, "a b c d " * 140, Recipe(), Knobs(max_new_tokens=500))
    assert request.rows[0].prompt_length + request.sampling.max_new_tokens == session.context
    *_, last = compare(session, request)
    assert last.baseline[0].finished in ("length", "stop")


def test_stopping_ends_the_work(handlers: Handlers) -> None:
    stream = handlers.generate("the storm", QUIET._replace(max_new_tokens=100), NO_SLOTS, UNUSED)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert first.running
    assert first.new_tokens == 1
    assert not handlers.session.model._hooks.current().fns


def test_chat_hears_the_recipe(handlers: Handlers) -> None:
    def answer(slot: tuple[int | None, ...], row: tuple[Any, ...]) -> str:
        *_, (text, dropped) = handlers.chat([("user", "hello")], "Be kind.", QUIET, slot, row)
        assert dropped == 0
        return text

    assert answer(NO_SLOTS, UNUSED) != answer(slots(3), controls((12, "add", "all")))
    assert answer(NO_SLOTS, UNUSED) == answer(NO_SLOTS, UNUSED)


def test_every_knob_reaches_the_loop(handlers: Handlers) -> None:
    """One candidate is greedy, by any of the three filters; a stop string ends the text before it."""
    greedy = [row.text for row in run(handlers, "the storm", knobs=QUIET._replace(temperature=0)).baseline]
    for change in ({"top_k": 1}, {"min_p": 1}, {"top_p": 0.01}):
        assert [row.text for row in run(handlers, "the storm", knobs=QUIET._replace(**change)).baseline] == greedy
    assert [row.text for row in run(handlers, "the storm").baseline] != greedy
    text = greedy[0]
    stopped = run(handlers, "the storm", knobs=QUIET._replace(temperature=0, stop=text[3:5])).baseline[0]
    assert stopped.text == text[: text.index(text[3:5])]
    assert stopped.finished == "stop_string"
    free = [text for text, _ in handlers.chat([("user", "hello")], "", QUIET, NO_SLOTS, UNUSED)][-1]
    assert len(free) > 2
    ended = [text for text, _ in handlers.chat([("user", "hello")], "", QUIET._replace(stop=free[1]), NO_SLOTS, UNUSED)][-1]
    assert free.startswith(ended)
    assert free[1] not in ended


# Finding and reading


def test_search_ranks_titles_first(session: Session) -> None:
    features = session.needs_features()
    hits = by_label(features, "storm")
    assert hits
    assert all("storm" in hit.label for hit in hits)
    assert by_label(features, "STORMS sea")[0].label == "storms at sea"
    assert [hit.latent for hit in by_label(features, "#7")] == [7]
    assert by_label(features, "zebra") == []
    ranked = by_label(features, "")
    assert [hit.value for hit in ranked] == sorted((hit.value for hit in ranked), reverse=True)


def test_firing_features_against_the_plain_maximum(session: Session) -> None:
    features = session.needs_features()
    lines = ["the storm tore the roof", "rain fell"]
    share = torch.zeros(features.n_latents)
    for line in lines:
        ids = session.tokenizer.encode(line, bos=True)
        x = session.model.capture(torch.tensor([ids]), sites=[features.site])[features.site][0]
        dense = torch.zeros(len(ids) - 1, features.n_latents)
        for values, row in zip(dense, x[1:], strict=True):
            found = features.sae.encode(row[None])
            values.scatter_add_(0, found.indices[0], found.values[0])
        share += (dense.amax(0) / features.max_values).nan_to_num(0).clamp(max=1) / len(lines)
    hits = by_text(session, "\n".join(lines))
    assert [hit.value for hit in hits] == pytest.approx(share.sort(descending=True).values[: len(hits)].tolist())
    assert all(any(hit.token in line for line in lines) for hit in hits)
    with pytest.raises(ValueError, match="context holds 1,024"):
        by_text(session, "word " * 400)


def test_neighbours_are_by_cosine(session: Session) -> None:
    features = session.needs_features()
    rows = torch.nn.functional.normalize(features.sae.W_dec, dim=1)
    cosine = rows @ rows[5]
    cosine[5] = -2
    assert [hit.latent for hit in similar(features, 5, 4)] == cosine.topk(4).indices.tolist()


def test_card_says_what_is_known(handlers: Handlers, session: Session) -> None:
    features = session.needs_features()
    shown = handlers.open("#3", None)
    assert shown.lens == 3
    best = features.top.sentences(3, n=1)[0]
    assert LABELS[3] in shown.card
    assert f"<b>{best.value:.3g}</b>" in shown.card
    assert f'data-open="{similar(features, 3, 1)[0].latent}"' in shown.card
    with pytest.raises(ValueError, match="latents 0 to 47"):
        handlers.open(48, None)


def test_text_of_others_is_escaped(session: Session) -> None:
    evil = '<img src="http://x" onerror=alert(1)>'
    row = Row(evil, tuple(session.tokenizer.encode(evil, bos=True)), 4, text=evil)
    values = [1.0] * (len(row.ids) - 1)
    snapshot = Snapshot((row,), (row,))
    pages = [
        views.columns(session, snapshot, None), views.columns(session, snapshot, 3, [values, values]), views.note(evil),
        views.transcript([("user", evil)]), views.status(evil), views.tokens([evil], [1.0], 1.0), views.examples([evil]),
    ]  # fmt: skip
    for page in pages:
        assert "<img" not in page
        assert "&lt;" in page


def test_the_same_sentence_is_shown_once(session: Session) -> None:
    best = session.needs_features().top.sentences(3)
    assert views.distinct([best[0], best[0], *best[1:], best[1]]) == best[: views.N_SENTENCES]


def test_shading_follows_the_values(session: Session) -> None:
    html = views.tokens(["a", "b", "c"], [0.0, 1.0, 4.0], 2.0)
    assert html.startswith('a<span class="tok" style="--v:0.500"')
    assert "--v:1.000" in html


# Recipes on the page


def test_recipes_go_to_the_page_and_back(handlers: Handlers) -> None:
    chosen, row = slots(3, 7), controls((-4.5, "clamp", "generated"), (12, "add", "from 9"))
    recipe = handlers.recipe(chosen, row)
    assert recipe.edits[1].positions == 9
    back, values = handlers.applied(recipe.to_json())
    assert back == chosen
    assert handlers.recipe(back, [value for one in values for value in one]) == recipe
    foreign = Recipe((Edit(latent=3),), "another").to_json()
    for text, message in (
        (foreign, "'another'"),
        ("", "no recipe"),
        (recipe.to_json().replace("-4.5", "-11"), "from -10 to 30"),
    ):
        with pytest.raises(ValueError, match=message):
            handlers.applied(text)


def test_edits_fill_free_rows(handlers: Handlers) -> None:
    chosen = NO_SLOTS
    for latent in range(N_SLOTS):
        chosen, row = handlers.add(latent, chosen)
        assert row == latent
    assert handlers.add(2, chosen) == (chosen, 2)
    features = handlers.features
    largest, row_norm = float(features.max_values[3]), features.sae.cfg.d_model**0.5
    assert handlers.fresh(3).strength * largest == pytest.approx(0.4 * row_norm, abs=0.125 * largest)
    with pytest.raises(ValueError, match="all 6 edits are in use"):
        handlers.add(40, chosen)


# Measured strengths


def test_measured_strengths_are_offered(session: Session) -> None:
    features = replace(session.needs_features(), best_strengths={7: 2.34, 3: 99.0})
    handlers = Handlers(replace(session, features=features), "plain")
    assert handlers.fresh(7).strength == 2.34
    assert handlers.fresh(3).strength == 30
    assert handlers.fresh(5).strength == Handlers(session, "plain").fresh(5).strength
    assert "at 2.34 × its maximum" in handlers.open(7, None).card
    assert "measured to steer best" not in handlers.open(5, None).card
    assert [hit.latent for hit in handlers.starters] == [7, 3]
    assert len(Handlers(session, "plain").starters) == N_STARTERS

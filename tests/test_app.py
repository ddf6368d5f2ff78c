"""The workbench without its page: limits that hold whatever the client, both columns, finding features, what is shown."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from core.cli import parse
from inference.card import N_SENTENCES, distinct
from inference.finding import similar
from inference.row import Row
from inference.session import N_PRESETS, Feature, InferenceConfig, Session, open_session
from inference.steering import FORMAT, FORMAT_OF_SEVERAL, Edit, Recipe
from inference.web import views
from inference.web.finding import by_label, by_text
from inference.web.handlers import BY_LABEL, BY_TEXT, N_SLOTS, NO_SLOTS, Controls, Handlers, Slots
from inference.web.validation import Knobs, split_prompts
from inference.web.workbench import Snapshot
from llama3 import complete
from tests.tiny import tiny_llama
from tests.tiny_features import LABELS, Features, flags_of, tiny_sae, write_features

SITE, EARLIER = "layers.1.resid_post", "layers.0.resid_post"
QUIET = Knobs(max_new_tokens=8, temperature=0.9, seed=5)
UNUSED = tuple(Controls()) * N_SLOTS


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("app")
    model = tiny_llama(folder / "model", max_seq_len=1024)
    return write_features(folder, model, tiny_sae(model, SITE))


@pytest.fixture(scope="module")
def session(paths: Features) -> Session:
    return open_session(
        InferenceConfig(model=str(paths.model), sae=(paths.sae,), top=(paths.top,), explanations=(paths.explanations,)),
        torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def handlers(session: Session) -> Handlers:
    return Handlers(session, "plain")


def controls(*rows: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """What the page sends for its edit rows."""
    return tuple(value for row in (*rows, *[tuple(Controls())] * (N_SLOTS - len(rows))) for value in row)


def slots(*latents: Any) -> Slots:
    """Edit rows for latents of the first SAE, or for (site, latent) of any."""
    chosen = [Feature(*latent) if isinstance(latent, tuple) else Feature(SITE, latent) for latent in latents]
    return (*chosen, *[None] * (N_SLOTS - len(chosen)))


# Limits


def test_a_megabyte_is_refused_everywhere(handlers: Handlers) -> None:
    for text in ("x" * 2**20, "x\n" * 2**19):
        with pytest.raises(ValueError, match="8,000 characters"):
            handlers.generate(text, QUIET, NO_SLOTS, UNUSED)
        assert "300 characters" in handlers.find(SITE, BY_LABEL, text)
        assert "8,000 characters" in handlers.find(SITE, BY_TEXT, text)
        assert handlers.first(SITE, BY_LABEL, text) is None
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
    slot: Slots = NO_SLOTS,
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


def test_the_context_bounds_each_answer(handlers: Handlers) -> None:
    """A long prompt leaves less room for its own text, and takes none from the one beside it."""
    last = run(handlers, f"{'a b c d ' * 140}\nthe storm", knobs=QUIET._replace(max_new_tokens=500))
    long, short = last.baseline
    context = handlers.session.context
    assert long.prompt_length > 500
    assert long.finished in ("length", "stop")
    assert len(long.ids) == context or long.finished == "stop"
    assert len(short.ids) == short.prompt_length + 500 or short.finished == "stop"


def test_stopping_ends_the_work(handlers: Handlers) -> None:
    stream = handlers.generate("the storm", QUIET._replace(max_new_tokens=100), NO_SLOTS, UNUSED)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert first.running
    assert first.new_tokens == 1
    assert not handlers.session.model._hooks.current().fns


def test_chat_hears_the_recipe(handlers: Handlers) -> None:
    def answer(slot: Slots, row: tuple[Any, ...]) -> str:
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
    assert [hit.feature for hit in by_label(features, "#7")] == [Feature(SITE, 7)]
    assert by_label(features, "zebra") == []
    ranked = by_label(features, "")
    assert [hit.latent for hit in ranked] == features.first[: len(ranked)]
    assert all(hit.value == features.explanations[hit.latent].score for hit in ranked)


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
    hits = by_text(session, features, "\n".join(lines))
    assert [hit.value for hit in hits] == pytest.approx(share.sort(descending=True).values[: len(hits)].tolist())
    assert all(any(hit.token in line for line in lines) for hit in hits)
    with pytest.raises(ValueError, match="context holds 1,024"):
        by_text(session, features, "word " * 400)


def test_neighbours_are_by_cosine(session: Session) -> None:
    features = session.needs_features()
    rows = torch.nn.functional.normalize(features.sae.W_dec, dim=1)
    cosine = rows @ rows[5]
    cosine[5] = -2
    assert [hit.feature.latent for hit in similar(features, 5, 4)] == cosine.topk(4).indices.tolist()


def test_card_says_what_is_known(handlers: Handlers, session: Session) -> None:
    features = session.needs_features()
    shown = handlers.open("#3", "", None)
    assert shown.lens == Feature(SITE, 3)
    best = features.top.sentences(3, n=1)[0]
    assert LABELS[3] in shown.card
    assert f"<b>{best.value:.3g}</b>" in shown.card
    assert f'data-open="{similar(features, 3, 1)[0].feature.latent}"' in shown.card
    with pytest.raises(ValueError, match="latents 0 to 47"):
        handlers.open(48, SITE, None)


def test_text_of_others_is_escaped(session: Session) -> None:
    evil = '<img src="http://x" onerror=alert(1)>'
    row = Row(evil, tuple(session.tokenizer.encode(evil, bos=True)), 4, text=evil)
    values = [1.0] * (len(row.ids) - 1)
    snapshot, lens = Snapshot((row,), (row,)), Feature(SITE, 3)
    pages = [
        views.columns(session, snapshot, None), views.columns(session, snapshot, lens, [values, values]), views.note(evil),
        views.transcript([("user", evil)]), views.status(evil), views.tokens([evil], [1.0], 1.0), views.examples([evil]),
    ]  # fmt: skip
    for page in pages:
        assert "<img" not in page
        assert "&lt;" in page


def test_the_same_sentence_is_shown_once(session: Session) -> None:
    best = session.needs_features().top.sentences(3)
    assert distinct([best[0], best[0], *best[1:], best[1]]) == best[:N_SENTENCES]


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
        chosen, row = handlers.add(latent, SITE, chosen)
        assert row == latent
    assert handlers.add(2, "", chosen) == (chosen, 2)
    features = handlers.session.needs_features()
    largest, row_norm = float(features.max_values[3]), features.sae.cfg.d_model**0.5
    assert handlers.fresh(Feature(SITE, 3)).strength * largest == pytest.approx(0.4 * row_norm, abs=0.125 * largest)
    with pytest.raises(ValueError, match="all 6 edits are in use"):
        handlers.add(40, "", chosen)


# Measured strengths


def test_measured_strengths_are_offered(session: Session) -> None:
    features = replace(session.needs_features(), best_strengths={7: 2.34, 3: 99.0})
    handlers, fifth = Handlers(replace(session, features=(features,)), "plain"), Feature(SITE, 5)
    assert handlers.fresh(Feature(SITE, 7)).strength == 2.34
    assert handlers.fresh(Feature(SITE, 3)).strength == 30
    assert handlers.fresh(fifth).strength == Handlers(session, "plain").fresh(fifth).strength
    assert "at 2.34 × its maximum" in handlers.open(7, "", None).card
    assert "when measured" not in handlers.open(5, "", None).card
    assert {hit.feature.latent for hit in handlers.starters} == {7, 3}
    assert len(Handlers(session, "plain").starters) == N_PRESETS


# Several SAEs


@pytest.fixture(scope="module")
def both(paths: Features, tmp_path_factory: pytest.TempPathFactory) -> Handlers:
    """The app with the SAE of `paths` and a second one, of another width, at an earlier layer."""
    sae = tiny_sae(paths.model, EARLIER, n_latents=40, seed=8)
    earlier = write_features(tmp_path_factory.mktemp("earlier"), paths.model, sae)
    config = parse(InferenceConfig, "", flags_of(paths, earlier))
    return Handlers(open_session(config, torch.device("cpu")), "plain")


def test_edits_at_two_sites_are_what_lone_runs_give(both: Handlers) -> None:
    """Both columns against the plain `complete` with the hooks of each SAE entered by hand."""
    session, prompts, sampling = both.session, ["the storm", "she read the letter"], QUIET.checked()
    chosen, row = slots(3, (EARLIER, 3)), controls((9, "add", "all"), (2.5, "clamp", "from 4"))
    last = run(both, "\n".join(prompts), chosen, row)
    assert last.steered is not None
    later, earlier = session.steerings()
    lengths = [row.prompt_length for row in last.baseline]
    parts = [
        one.hooks_for([Recipe((edit,), one.sae.weights_hash)] * 2, lengths)
        for one, edit in (
            (later, Edit(latent=3, strength=9.0)),
            (earlier, Edit(latent=3, strength=2.5, mode="clamp", positions=4)),
        )
    ]

    def hooks(positions: torch.Tensor) -> dict[str, Any]:
        return {site: fn for part in parts if part is not None for site, fn in part(positions).items()}

    texts = [row.text for row in last.steered]
    assert texts == complete(session.model, session.tokenizer, prompts, sampling, hooks)
    for alone, one in ((chosen[0], controls((9, "add", "all"))), (chosen[1], controls((2.5, "clamp", "from 4")))):
        lone = run(both, "\n".join(prompts), (alone, *NO_SLOTS[1:]), one).steered
        assert lone is not None
        assert [row.text for row in lone] != texts
    assert not session.model._hooks.current().fns


def test_recipes_of_two_sites_go_to_the_page_and_back(both: Handlers, handlers: Handlers) -> None:
    """Each edit keeps its SAE, whichever comes first; a recipe of one SAE is written in the first format."""
    later, earlier = (features.sae.weights_hash for features in both.session.features)
    chosen, row = (
        slots((EARLIER, 3), 3, (EARLIER, 39)),
        controls((4, "add", "all"), (2, "ablate", "prompt"), (1, "add", "from 9")),
    )
    recipe = both.recipe(chosen, row)
    assert [recipe.sae_of(edit) for edit in recipe.edits] == [earlier, later, earlier]
    assert [edit.sae_hash for edit in recipe.edits] == ["", later, ""]
    text = recipe.to_json()
    assert json.loads(text)["format"] == FORMAT_OF_SEVERAL
    back, values = both.applied(text)
    assert back == chosen
    assert both.recipe(back, [value for one in values for value in one]) == recipe
    only = both.recipe(slots((EARLIER, 3)), controls((4, "add", "all")))
    assert json.loads(only.to_json())["format"] == FORMAT
    assert both.applied(only.to_json())[0] == slots((EARLIER, 3))
    for refused, message in ((text, f"'{earlier}'"), (only.to_json(), f"'{earlier}'")):
        with pytest.raises(ValueError, match=message):
            handlers.applied(refused)
    for foreign, message in (
        (text.replace(later, "stranger"), f"latent 3 belongs to the SAE 'stranger', but the ones loaded are .*{EARLIER}"),
        (text.replace('"latent": 39', '"latent": 40'), "latent 40 is out of range; this SAE has latents 0 to 39"),
    ):
        with pytest.raises(ValueError, match=message):
            both.applied(foreign)


def test_limits_are_those_of_the_site(both: Handlers) -> None:
    """Latent 44 is one of the first SAE and none of the second; a site without an SAE is named with those that have one."""
    assert both.open(44, "", None).lens == Feature(SITE, 44)
    for latent, site, message in (
        (44, EARLIER, f"latent 44 is out of range; the SAE at {EARLIER} has latents 0 to 39"),
        (3, "layers.9.resid_post", f"no SAE is loaded at 'layers.9.resid_post'; loaded: {SITE}, {EARLIER}"),
        (3, {"a": "x" * 10**6}, "no SAE is loaded at"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            both.open(latent, site, None)
        assert len(str(refused.value)) < 200
        with pytest.raises(ValueError, match=re.escape(message)):
            both.add(latent, site, NO_SLOTS)
        with pytest.raises(ValueError, match=re.escape(message)):
            list(both.generate("the storm", QUIET, slots((site, latent)), controls((4, "add", "all"))))
    assert "no SAE is loaded at" in both.find("embed", BY_LABEL, "storms")
    assert both.first("embed", BY_LABEL, "storms") is None


def test_each_site_has_its_own_features(both: Handlers) -> None:
    """Searches, cards, neighbours, shading and rows of edits of the second SAE say so, and none is taken for the first's."""
    session, earlier = both.session, both.session.at(EARLIER)
    for scope, text in ((BY_LABEL, "storms"), (BY_TEXT, "the storm tore the roof")):
        found = both.first(EARLIER, scope, text)
        assert found is not None
        assert found.site == EARLIER
        assert f'data-open="{found.latent}" data-site="{EARLIER}"' in both.find(EARLIER, scope, text)
        assert "data-site" not in both.find(SITE, scope, text)
    hits = by_text(session, earlier, "the storm tore the roof")
    assert hits != [
        one._replace(feature=Feature(EARLIER, one.feature.latent))
        for one in by_text(session, session.at(SITE), "the storm tore the roof")
    ]
    snapshot = run(both, "the storm", knobs=QUIET._replace(max_new_tokens=2))
    assert found is not None
    shown = both.open(found.latent, EARLIER, snapshot)
    near = similar(earlier, found.latent, 1)[0].feature
    assert f'data-open="{near.latent}" data-site="{EARLIER}"' in shown.card
    for html in (shown.card, shown.legend, views.edit_title(session, found)):
        assert f'<span class="where">{EARLIER}</span>' in html
    ids = snapshot.baseline[0].ids
    read = session.read(ids, EARLIER).of(found.latent)[1:]
    assert max(read) > 0
    assert f'title="{max(read):.3g}, ' in shown.columns
    assert shown.columns != both.open(found.latent, SITE, snapshot).columns


def test_one_site_is_not_named(handlers: Handlers) -> None:
    shown = handlers.open(3, "", None)
    page = shown.card + views.edit_title(handlers.session, shown.lens) + handlers.find("", BY_LABEL, "storms")
    assert "data-site" not in page
    assert SITE not in page

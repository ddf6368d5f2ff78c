"""Steering: every mode against the plain formula, exactness where nothing is asked for, rows that differ, threads, recipes."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.session import Features as Features_
from inference.session import InferenceConfig, Session, open_session
from inference.steering import MODES, Edit, Reader, Recipe, Steering, chain, hooks_for_all
from inference.watch import Alarm, Watch, parse_latents
from llama3.generate import HooksFor, Sampling, generate
from llama3.sites import Hook
from sae.architectures import names
from sae.model import SAE, SAEConfig
from tests.sae_folders import own_tensors
from tests.tiny import tiny_llama
from tests.tiny_features import SENTENCES, Features, tiny_sae, write_features

SITE = "layers.1.resid_post"
MANY = [f'{{"latent": {i}}}' for i in range(33)]
GREEDY = Sampling(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("steering")
    model = tiny_llama(folder / "model")
    return write_features(folder, model, tiny_sae(model, SITE))


@pytest.fixture(scope="module")
def session(paths: Features) -> Session:
    return open_session(config_of(paths), torch.device("cpu"))


@pytest.fixture(scope="module")
def layer_steering(paths: Features, session: Session) -> Steering:
    sae = tiny_sae(paths.model, SITE, seed=3, norm="layer")
    return Steering(sae, SITE, torch.full((sae.cfg.n_latents,), 2.0))


def config_of(*runs: Features, **changes: Any) -> InferenceConfig:
    """Flags for the SAEs of `runs`, which share a model."""
    flags: dict[str, Any] = {name: tuple(getattr(run, name) for run in runs) for name in ("sae", "top", "explanations")}
    return InferenceConfig(**({"model": str(runs[0].model)} | flags | changes))


def recipe(steering: Steering, *edits: Edit) -> Recipe:
    return Recipe(edits, steering.sae.weights_hash)


def prompt(session: Session, row: int = 0) -> list[int]:
    return session.tokenizer.encode(SENTENCES[row], bos=True)


def logits(session: Session, rows: Sequence[Sequence[int]], hooks: HooksFor | None) -> Tensor:
    """Logits of rows of equal length in one pass without a cache."""
    tokens = torch.tensor(rows)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad(), session.model.hooks(hooks(positions) if hooks else {}):
        return session.model(tokens)


def edited(
    session: Session, steering: Steering, ids: list[int], *edits: Edit, prompt_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """The site's activations (T, D) without and with a recipe."""
    x = session.model.capture(torch.tensor([ids]), sites=[SITE])[SITE]
    hooks = steering.hooks_for([recipe(steering, *edits)], [prompt_length or len(ids)])
    assert hooks is not None
    after = hooks(torch.arange(len(ids))[None])[SITE](x)
    assert after is not None
    return x[0], after[0]


def text_of(
    session: Session, rows: Sequence[Sequence[int]], hooks: HooksFor | None, sampling: Sampling = GREEDY
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in rows]
    for piece in generate(session.model, session.tokenizer, rows, sampling, hooks):
        found[piece.row].append(piece.token_id)
    return found


def reference(steering: Steering, x: Tensor, edit: Edit, positions: Sequence[int]) -> Tensor:
    """The modes as the issue states them, one token at a time, with dense pre-activations."""
    sae, out = steering.sae, x.clone()
    goal = edit.strength * float(steering.max_values[edit.latent])
    for t in positions:
        norm = sae.normalise(x[t : t + 1])
        h = ((norm.z - sae.b_pre) @ sae.W_enc.T + sae.b_enc)[0]
        kept = h.topk(sae.cfg.k).indices
        value = float(h[edit.latent].relu()) if edit.latent in kept.tolist() else 0.0
        direction = sae.W_dec[edit.latent] / norm.scale[0, 0]
        if edit.mode == "add":
            out[t] = x[t] + goal * direction
        elif edit.mode == "clamp":
            out[t] = x[t] + (goal - value) * direction
        elif edit.mode == "ablate":
            out[t] = x[t] - value * direction
        else:
            h[edit.latent] += goal
            kept = h.topk(sae.cfg.k).indices
            z_hat = h[kept].relu() @ sae.W_dec[kept] + sae.b_pre
            out[t] = z_hat / norm.scale[0, 0] + norm.mean[0, 0]
    return out


@pytest.mark.parametrize("mode", ["add", "clamp", "ablate", "replace"])
@pytest.mark.parametrize("norm", ["dataset", "layer"])
def test_each_mode_is_its_formula(session: Session, layer_steering: Steering, mode: str, norm: str) -> None:
    steering = session.needs_features().steering if norm == "dataset" else layer_steering
    ids = prompt(session)
    firing = steering.sae.encode(session.model.capture(torch.tensor([ids]), sites=[SITE])[SITE][0, 1:])
    latent = int(firing.indices[2, 0])
    edit = Edit(latent=latent, strength=1.5, mode=mode, positions="all")  # type: ignore[arg-type]
    before, after = edited(session, steering, ids, edit)
    torch.testing.assert_close(after, reference(steering, before, edit, range(1, len(ids))), atol=2e-5, rtol=1e-5)
    assert torch.equal(after[0], before[0]), "the attention sink was edited"
    assert not torch.allclose(after[1:], before[1:], atol=1e-3)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("all", range(1, 9)), ("prompt", range(1, 5)), ("generated", range(5, 9)), (7, range(7, 9)), (0, range(1, 9))],
)
def test_positions(session: Session, positions: str | int, expected: range) -> None:
    ids = prompt(session)[:9]
    edit = Edit(latent=3, strength=2.0, positions=positions)
    before, after = edited(session, session.needs_features().steering, ids, edit, prompt_length=5)
    changed = [t for t in range(9) if not torch.equal(before[t], after[t])]
    assert changed == list(expected)


def test_several_edits_add_up(session: Session) -> None:
    steering = session.needs_features().steering
    ids = prompt(session)
    one, two = Edit(latent=3, strength=2.0), Edit(latent=7, strength=0.5, mode="clamp")
    before, together = edited(session, steering, ids, one, two)
    alone = [edited(session, steering, ids, edit)[1] - before for edit in (one, two)]
    torch.testing.assert_close(together, before + alone[0] + alone[1], atol=1e-5, rtol=1e-5)


def test_nothing_to_do_is_bit_identical(session: Session) -> None:
    steering = session.needs_features().steering
    ids = prompt(session)
    plain = logits(session, [ids], None)
    for empty in (Recipe(), recipe(steering, Edit(latent=3, strength=0.0)), recipe(steering, Edit(latent=3, strength=-0.0))):
        assert steering.hooks_for([empty], [len(ids)]) is None
    assert hooks_for_all([steering], [Recipe()], [len(ids)]) is None
    far = steering.hooks_for([recipe(steering, Edit(latent=3, strength=9.0, positions=500))], [len(ids)])
    assert torch.equal(logits(session, [ids], far), plain)
    assert not torch.equal(logits(session, [ids], steering.hooks_for([recipe(steering, Edit(latent=3))], [len(ids)])), plain)


def test_clamp_to_the_natural_value_changes_nothing(session: Session) -> None:
    features = session.needs_features()
    ids = prompt(session)
    last = len(ids) - 1
    reading = session.read(ids)
    latent, value = int(reading.indices[last, 0]), float(reading.values[last, 0])
    natural = Edit(latent=latent, strength=value / float(features.max_values[latent]), mode="clamp", positions=last)
    hooks = features.steering.hooks_for([recipe(features.steering, natural)], [len(ids)])
    assert hooks is not None
    difference = (logits(session, [ids], hooks) - logits(session, [ids], None)).abs().max()
    assert float(difference) <= 1e-5


def test_clamp_sets_the_latent_and_keeps_the_error(session: Session) -> None:
    """Where directions overlap, the value read afterwards need not be the one set; the reconstruction error must stay."""
    steering = session.needs_features().steering
    sae, ids = steering.sae, prompt(session)
    edit = Edit(latent=3, strength=1.0, mode="clamp")
    before, after = edited(session, steering, ids, edit)
    latents = sae.encode(before[1:])
    values = torch.zeros(len(ids) - 1, sae.cfg.n_latents).scatter_add(1, latents.indices, latents.values)
    error = before[1:] - sae.decode(latents)
    values[:, 3] = float(steering.max_values[3])
    expected = (values @ sae.W_dec + sae.b_pre) / sae.cfg.scale + error
    torch.testing.assert_close(after[1:], expected, atol=2e-5, rtol=1e-5)


def test_cache_and_padding_do_not_matter(session: Session) -> None:
    """Rows of different length with different recipes in one batch, token by token, against lone passes over the whole text."""
    steering = session.needs_features().steering
    rows = [prompt(session, 0)[:12], prompt(session, 1)[:5], prompt(session, 2)[:9]]
    recipes = [
        recipe(steering, Edit(latent=3, strength=6.0)),
        Recipe(),
        recipe(steering, Edit(latent=5, strength=4.0, mode="clamp", positions="generated"), Edit(latent=9, mode="ablate")),
    ]
    lengths = [len(row) for row in rows]
    together = text_of(session, rows, steering.hooks_for(recipes, lengths))
    for row, one, found in zip(rows, recipes, together, strict=True):
        whole = [*row, *found]
        scores = logits(session, [whole], steering.hooks_for([one], [len(row)]))[0]
        for i, token in enumerate(found):
            at = scores[len(row) - 1 + i]
            assert float(at.max() - at[token]) < 1e-3, f"token {i} is not the best one under the same edits"
    assert together[0] != text_of(session, rows[:1], None)[0]
    assert together[1] == text_of(session, rows[1:2], None)[0]


def test_a_row_beside_steered_ones_keeps_its_bits(session: Session) -> None:
    steering = session.needs_features().steering
    rows = [prompt(session, 0)[:6], prompt(session, 1)[:6], prompt(session, 2)[:6]]
    nothing = recipe(steering, Edit(latent=3, strength=0.0))
    for mode in MODES:
        strong = recipe(steering, Edit(latent=5, strength=4.0, mode=mode))  # type: ignore[arg-type]
        found = logits(session, rows, steering.hooks_for([strong, Recipe(), nothing], [6, 6, 6]))
        plain = logits(session, rows, None)
        assert torch.equal(found[1:], plain[1:])
        assert not torch.equal(found[0], plain[0]) or mode == "ablate"


def test_nothing_is_left_behind(session: Session) -> None:
    steering = session.needs_features().steering
    weights = {name: p.clone() for m in (session.model, steering.sae) for name, p in m.named_parameters()}
    ids = prompt(session)
    hooks = steering.hooks_for([recipe(steering, Edit(latent=3, strength=5.0, mode="replace"))], [len(ids)])
    stream = generate(session.model, session.tokenizer, [ids], GREEDY, hooks)
    next(stream)
    assert torch.equal(logits(session, [ids], None), logits(session, [ids], None))
    assert not session.model._hooks.current().fns, "hooks stayed between two steps"
    stream.close()  # type: ignore[attr-defined]

    def broken(positions: Tensor) -> dict[str, object]:
        def fail(x: Tensor) -> None:
            raise RuntimeError("in the middle")

        return {SITE: fail}

    with pytest.raises(RuntimeError, match="in the middle"):
        list(generate(session.model, session.tokenizer, [ids], GREEDY, chain(hooks, broken)))  # type: ignore[arg-type]
    assert not session.model._hooks.current().fns
    for module in (session.model, steering.sae):
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, weights[name])


def test_threads_do_not_meet(session: Session) -> None:
    steering = session.needs_features().steering
    jobs = [(prompt(session, i % 4)[:8], recipe(steering, Edit(latent=i, strength=float(i % 5)))) for i in range(12)]

    def answer(job: tuple[list[int], Recipe]) -> list[int]:
        return text_of(session, [job[0]], steering.hooks_for([job[1]], [len(job[0])]))[0]

    serial = [answer(job) for job in jobs]
    assert len({tuple(found) for found in serial}) > 4
    found: list[list[int]] = [[] for _ in jobs]

    def work(i: int) -> None:
        found[i] = answer(jobs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == serial


def test_bfloat16_activations_keep_their_type(session: Session) -> None:
    steering = session.needs_features().steering
    hooks = steering.hooks_for([recipe(steering, Edit(latent=3))], [4])
    assert hooks is not None
    x = torch.randn(1, 4, 32, dtype=torch.bfloat16)
    after = hooks(torch.arange(4)[None])[SITE](x)
    assert after is not None
    assert after.dtype == torch.bfloat16
    assert after.shape == x.shape


# Recipes


def test_recipe_survives_its_text(tmp_path: Path) -> None:
    original = Recipe(
        (
            Edit(latent=896, strength=6.5),
            Edit(latent=1204, mode="clamp", positions=12),
            Edit(latent=3, strength=-2, mode="ablate", positions="generated"),
        ),
        "abc",
    )
    assert Recipe.from_json(original.to_json()) == original
    (tmp_path / "recipe.json").write_text(original.to_json(), encoding="utf-8-sig")  # as some editors save it
    assert Recipe.read(tmp_path / "recipe.json") == original
    assert json.loads(original.to_json())["edits"][1]["positions"] == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": -1}, "whole number from 0"),
        ({"latent": True}, "whole number from 0"),
        ({"latent": 1.5}, "whole number from 0"),
        ({"strength": float("nan")}, "must be within"),
        ({"strength": 10**400}, "must be within"),
        ({"strength": 1e38}, "must be within"),
        ({"strength": "6"}, "strength must be a number"),
        ({"mode": "boost"}, "unknown mode 'boost'"),
        ({"positions": "some"}, "positions must be"),
        ({"positions": -3}, "positions must be"),
        ({"positions": 10**30}, "positions must be"),
        ({"positions": None}, "positions must be"),
        ({"colour": 1}, "unknown key 'colour'"),
    ],
)
def test_bad_edits_are_named(change: dict[str, object], message: str) -> None:
    edit = {"latent": 1, "strength": 1.0, "mode": "add", "positions": "all"} | change
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(json.dumps({"format": "steering-recipe/1", "sae_hash": "x", "edits": [edit]}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 50_000, "not valid JSON"),
        ("[]", "found 'list'"),
        ('{"format": "other/2"}', "expected an object with format"),
        ('{"format": "steering-recipe/1", "sae_hash": "x"}', "needs edits"),
        ('{"format": "steering-recipe/1", "sae_hash": "x", "edits": [7]}', "each edit must be an object"),
        ('{"format": "steering-recipe/1", "sae_hash": "", "edits": [{"latent": 1}]}', "must name its SAE"),
        ('{"format": "steering-recipe/1", "sae_hash": "x", "edits": [{"latent": 1}, {"latent": 1}]}', "edited twice"),
        (f'{{"format": "steering-recipe/1", "sae_hash": "x", "edits": [{", ".join(MANY)}]}}', "at most 32"),
        (" " * 70_000, "at most 64,000 characters"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(text)


def test_prompt_and_answer_may_differ() -> None:
    Recipe((Edit(latent=1, positions="prompt"), Edit(latent=1, strength=3.0, positions="generated")), "x")


# Several SAEs


@pytest.fixture(scope="module")
def two(paths: Features, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session with an SAE at each of two layers."""
    earlier = write_features(
        tmp_path_factory.mktemp("earlier"), paths.model, tiny_sae(paths.model, "layers.0.resid_post", seed=8)
    )
    return open_session(config_of(paths, earlier), torch.device("cpu"))


def test_edits_at_several_sites(two: Session) -> None:
    """One recipe over two SAEs against a pass that adds both directions by hand, and against the order of its edits."""
    later, earlier = two.steerings()
    ids = prompt(two)
    edits = (Edit(latent=3, strength=2.0), Edit(latent=3, strength=1.5, sae_hash=earlier.sae.weights_hash))
    hooks = hooks_for_all([later, earlier], [Recipe(edits, later.sae.weights_hash)], [len(ids)])

    def adding(steering: Steering, strength: float) -> Hook:
        vector = steering.sae.W_dec[3] / steering.sae.cfg.scale * strength * float(steering.max_values[3])
        return lambda x: torch.cat([x[:, :1], x[:, 1:] + vector], dim=1)

    with torch.no_grad(), two.model.hooks({later.site: adding(later, 2.0), earlier.site: adding(earlier, 1.5)}):
        expected = two.model(torch.tensor([ids]))
    torch.testing.assert_close(logits(two, [ids], hooks), expected, atol=1e-4, rtol=1e-4)
    named = tuple(replace(edit, sae_hash=edit.sae_hash or later.sae.weights_hash) for edit in reversed(edits))
    again = hooks_for_all([earlier, later], [Recipe(named)], [len(ids)])
    torch.testing.assert_close(logits(two, [ids], again), expected, atol=1e-4, rtol=1e-4)
    assert hooks_for_all([later, earlier], [Recipe()], [len(ids)]) is None
    only = hooks_for_all([later, earlier], [Recipe(edits[:1], later.sae.weights_hash)], [len(ids)])
    alone_ = later.hooks_for([Recipe(edits[:1], later.sae.weights_hash)], [len(ids)])
    assert torch.equal(logits(two, [ids], only), logits(two, [ids], alone_))


def test_rows_at_different_sites(two: Session) -> None:
    """In one batch a row steered at one layer, one at the other, one not at all: each as if alone."""
    later, earlier = two.steerings()
    rows = [prompt(two, 0)[:10], prompt(two, 1)[:6], prompt(two, 2)[:8]]
    recipes = [
        recipe(later, Edit(latent=3, strength=6.0)),
        recipe(earlier, Edit(latent=5, strength=5.0, mode="clamp")),
        Recipe(),
    ]
    lengths = [len(row) for row in rows]
    together = text_of(two, rows, hooks_for_all([later, earlier], recipes, lengths))
    for row, one, found in zip(rows, recipes, together, strict=True):
        assert found == text_of(two, [row], hooks_for_all([later, earlier], [one], [len(row)]))[0]
    assert together[2] == text_of(two, rows[2:], None)[0]
    assert together[1] != text_of(two, rows[1:2], None)[0]


def test_recipes_over_several_saes_survive_their_text(two: Session) -> None:
    later, earlier = (steering.sae.weights_hash for steering in two.steerings())
    original = Recipe((Edit(latent=3), Edit(latent=3, sae_hash=earlier, strength=2.5)), later)
    text = original.to_json()
    assert Recipe.from_json(text) == original
    assert json.loads(text)["format"] == "steering-recipe/2"
    assert [set(edit) - {"latent", "strength", "mode", "positions"} for edit in json.loads(text)["edits"]] == [
        set(),
        {"sae_hash"},
    ]
    assert original.of(earlier) == Recipe((Edit(latent=3, strength=2.5),), earlier)
    with pytest.raises(ValueError, match="edited twice"):
        Recipe((Edit(latent=3), Edit(latent=3, sae_hash=later)), later)
    with pytest.raises(ValueError, match="unknown key 'sae_hash'"):
        Recipe.from_json(text.replace("recipe/2", "recipe/1"))
    with pytest.raises(ValueError, match="sae_hash must be text"):
        Recipe.from_json(text.replace(f'"{earlier}"', "7"))


def test_saes_that_are_not_there_are_named(two: Session, session: Session, paths: Features) -> None:
    later, earlier = two.steerings()
    both = Recipe((Edit(latent=3), Edit(latent=4, sae_hash=earlier.sae.weights_hash)), later.sae.weights_hash)
    with pytest.raises(ValueError, match=f"belongs to the SAE '{earlier.sae.weights_hash}', but"):
        hooks_for_all(session.steerings(), [both], [3])
    stranger = Recipe((Edit(latent=4),), "stranger")
    with pytest.raises(ValueError, match=r"latent 4 belongs to the SAE 'stranger', but the ones loaded are .*layers\.0"):
        hooks_for_all([later, earlier], [stranger], [3])
    with pytest.raises(ValueError, match="latents 0 to 47"):
        hooks_for_all([later, earlier], [recipe(earlier, Edit(latent=48))], [3])
    with pytest.raises(ValueError, match=r"a second SAE at layers\.1\.resid_post"):
        open_session(config_of(paths, paths), torch.device("cpu"))
    with pytest.raises(ValueError, match="--top is missing"):
        open_session(config_of(paths, top=(), explanations=()), torch.device("cpu"))


@pytest.mark.parametrize("architecture", names())
def test_values_read_are_those_of_the_encoding(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several blocks of rows, for latents that are silent everywhere, and where two latents tie."""
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=16, n_latents=40, k=4, architecture=architecture)).requires_grad_(False)
    for tensor in own_tensors(sae):
        tensor += torch.rand(40) / 2
    bias = sae.b_enc if hasattr(sae, "b_enc") else sae.b_mag
    bias[7] = -100.0
    for tensor in (sae.W_enc, bias, *own_tensors(sae)):
        tensor[9] = tensor[8]
    x = torch.randn(30, 16)
    encoding = sae.encode(x)
    expected = torch.zeros(30, 40).scatter_add(1, encoding.indices, encoding.values)
    monkeypatch.setattr("inference.steering.ROWS", 8)
    found = Reader(sae, torch.arange(40)).values(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found[:, 8] > 0).any()
    for latent in range(40):
        torch.testing.assert_close(
            Reader(sae, torch.tensor([latent])).values(x[:1]), expected[:1, latent : latent + 1], atol=1e-5, rtol=0
        )
    assert torch.equal(Reader(sae, torch.tensor([7])).values(x), torch.zeros(30, 1))


def test_recipes_that_do_not_fit_are_refused(session: Session) -> None:
    steering = session.needs_features().steering
    cases = [
        (Recipe((Edit(latent=1),), "another"), f"'another', but '{steering.sae.weights_hash}' is loaded"),
        (recipe(steering, Edit(latent=48)), "latents 0 to 47"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            steering.hooks_for([bad], [3])
    silent = Steering(steering.sae, SITE, torch.zeros(48))
    with pytest.raises(ValueError, match="never fired"):
        silent.hooks_for([recipe(steering, Edit(latent=1))], [3])
    assert silent.hooks_for([recipe(steering, Edit(latent=1, mode="ablate"))], [3]) is not None


# Watching


def test_watch_reads_what_capture_reads(session: Session) -> None:
    features = session.needs_features()
    rows = [prompt(session, 0)[:9], prompt(session, 1)[:6]]
    alarms: list[Alarm] = []
    passes: list[list[list[int]]] = []

    def on_alarm(alarm: Alarm) -> None:
        assert alarm.position in passes[-1][alarm.row], "an alarm comes in the pass that reads its token"
        alarms.append(alarm)

    def hooks_for(positions: Tensor) -> Mapping[str, Hook]:
        passes.append(positions.tolist())
        return watch.hooks_for(positions)

    watch = Watch(features, (3, 5, 9), threshold=0.4, on_alarm=on_alarm)
    found = text_of(session, rows, hooks_for)
    for i, (row, new) in enumerate(zip(rows, found, strict=True)):
        whole = [*row, *new]
        reading = session.read(whole)
        for latent in (3, 5, 9):
            values = watch.values(i, latent, len(whole))
            assert values[0] is None
            assert values[-1] is None
            known = [value for value in values if value is not None]
            assert known == pytest.approx(reading.of(latent)[1:-1], abs=1e-4)
            loud = {t for t, value in enumerate(values) if value and value > 0.4 * float(features.max_values[latent])}
            assert {alarm.position for alarm in alarms if (alarm.row, alarm.latent) == (i, latent)} == loud
    assert alarms


def test_watch_reads_what_steering_leaves(session: Session) -> None:
    features = session.needs_features()
    ids = prompt(session)[:8]
    steered = features.steering.hooks_for([recipe(features.steering, Edit(latent=3, strength=8.0))], [len(ids)])
    watch = Watch(features, (3,))
    text_of(session, [ids], chain(steered, watch.hooks_for))
    assert min(value for value in watch.values(0, 3, 8)[1:] if value is not None) > 0
    with pytest.raises(ValueError, match="out of range"):
        Watch(features, (48,))
    silent = Features_(features.sae, SITE, features.top, {})
    silent.__dict__["max_values"] = torch.zeros(48)  # where the cached property keeps what it read
    Watch(silent, (3,))
    with pytest.raises(ValueError, match="never fired on the corpus"):
        Watch(silent, (3,), threshold=0.5)


def test_parse_latents() -> None:
    assert parse_latents(" 896, 1204,896 ") == (896, 1204)
    assert parse_latents("") == ()
    with pytest.raises(ValueError, match="separated by commas"):
        parse_latents("896;x")


# What does not belong together


def test_parts_of_other_runs_are_refused(paths: Features, session: Session, tmp_path: Path) -> None:
    other_model = tiny_llama(tmp_path / "model", seed=9)
    other = write_features(tmp_path, other_model, tiny_sae(other_model, SITE, seed=4))
    same_model = write_features(tmp_path / "same", paths.model, tiny_sae(paths.model, SITE, seed=5))
    features = session.needs_features()
    cases = [
        ({"sae": other.sae}, f"model_hash is .* but '{session.model.weights_hash}' is needed"),
        ({"top": same_model.top}, f"sae_hash is .* but '{features.sae.weights_hash}' is needed"),
        ({"explanations": same_model.explanations}, "explanations .*sae_hash is"),
        ({"top": paths.sae}, "expected a folder of kind top_sentences, found sae"),
        ({"sae": tmp_path / "none"}, "no such folder"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            open_session(config_of(paths, **{name: (path,) for name, path in change.items()}), torch.device("cpu"))

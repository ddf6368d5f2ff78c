"""The face for Python: what a session returns against the same done by hand, several SAEs, and what is refused."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import inference.chat
import inference.complete
import llama3_sae as ls
from core.cli import parse
from inference.chat import ChatConfig
from inference.complete import CompleteConfig
from inference.steering import Edit, Recipe
from llama3 import load_model, load_tokenizer
from llama3.generate import Sampling, complete
from llama3_sae.results import Active, TextFeatures, TokenFeatures
from sae.formats import FORMATS
from tests.tiny import tiny_llama
from tests.tiny_features import SENTENCES, Features, alone, tiny_sae, write_features

SITE, EARLIER = "layers.1.resid_post", "layers.0.resid_post"
TEXT = SENTENCES[0]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("face")
    model = tiny_llama(folder / "model")
    return write_features(folder, model, tiny_sae(model, SITE))


@pytest.fixture(scope="module")
def earlier(paths: Features, tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write_features(tmp_path_factory.mktemp("earlier"), paths.model, tiny_sae(paths.model, EARLIER, seed=8))


@pytest.fixture(scope="module")
def session(paths: Features) -> ls.Session:
    return ls.open(paths.model, paths.sae, paths.top, str(paths.explanations), device="cpu")


@pytest.fixture(scope="module")
def two(paths: Features, earlier: Features) -> ls.Session:
    folders = {name: [getattr(run, name) for run in (paths, earlier)] for name in ("sae", "top", "explanations")}
    return ls.open(str(paths.model), **folders, device="cpu")


@pytest.fixture
def bare(paths: Features) -> ls.Session:
    return ls.open(paths.model, device="cpu")


def by_hand(session: ls.Session, text: str, site: str = SITE) -> Tensor:
    """Dense latents [T, n] of a text, BOS included."""
    features = session.loaded.at(site)
    ids = [session.tokenizer.bos_id, *session.tokenizer.encode(text)]
    with torch.no_grad():
        x = session.model.capture(torch.tensor([ids]), sites=[site])[site][0]
        found = features.sae.encode(x)
    return torch.zeros(len(ids), features.n_latents).scatter_add(1, found.indices, found.values)


def run_terminal(paths: Features, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    inference.complete.run(parse(CompleteConfig, "", [*paths.flags, *flags, "--json"]), alone())
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


# Reading


def test_tokens_and_activations_agree_in_length(session: ls.Session) -> None:
    tokens = session.tokens(TEXT)
    assert tokens.ids[0] == session.tokenizer.bos_id
    assert "".join(tokens.pieces[1:]) == TEXT
    x = session.capture(TEXT)
    assert len(tokens) == len(x)
    assert x.shape[1] == session.model.params.dim
    with torch.no_grad():
        expected = session.model.capture(torch.tensor([tokens.ids]), sites=[SITE, EARLIER])
    assert torch.equal(x, expected[SITE][0])
    assert torch.equal(session.capture(TEXT, EARLIER), expected[EARLIER][0])
    several = session.capture(TEXT, [SITE, "layers.1.ffn_hidden"])
    assert torch.equal(several[SITE], x)
    assert several["layers.1.ffn_hidden"].shape[1] == session.model.params.hidden_dim
    with pytest.raises(ValueError, match=re.escape("layers.7.resid_post")):
        session.capture(TEXT, "layers.7.resid_post")


def test_features_are_the_strongest_latents_of_each_token(session: ls.Session) -> None:
    found = session.features(TEXT, n=4)
    dense = by_hand(session, TEXT)
    maxima = session.saes[0].max_values
    assert [token.position for token in found] == list(range(1, len(dense)))
    assert "".join(token.token for token in found) == TEXT
    for token in found:
        row = dense[token.position]
        fires = [int(latent) for latent in torch.nonzero(row)[:, 0]]
        shares = {latent: float(row[latent] / maxima[latent]) if maxima[latent] > 0 else None for latent in fires}
        best = sorted(fires, key=lambda latent: (-(shares[latent] or 0.0), latent))[:4]
        assert [one.latent for one in token.latents] == best
        for one in token.latents:
            assert one.value == pytest.approx(float(row[one.latent]))
            assert one.share == (None if shares[one.latent] is None else pytest.approx(shares[one.latent]))
            assert one.label == session.saes[0].label(one.latent)


def test_without_bos_the_first_token_is_the_sink_and_is_not_read(paths: Features) -> None:
    session = ls.open(paths.model, paths.sae, paths.top, device="cpu")
    session.tokenizer.rules = replace(session.tokenizer.rules, add_bos=False)
    found = session.features(TEXT)
    assert "".join(session.tokens(TEXT).pieces) == "".join(token.token for token in found) == TEXT
    assert [token.position for token in found if not token.latents][:1] == [0]
    assert len(session.capture(TEXT)) == len(found)


def test_features_print_as_a_table_and_shade_the_text(session: ls.Session) -> None:
    found = session.features(TEXT, n=2)
    lines = repr(found).splitlines()
    assert lines[0].split() == ["token", "latent", "value", "share", "label"]
    assert len(lines) == 1 + len(found.rows())
    assert str(found[0].latents[0].latent) in lines[1]
    html = found._repr_html_()
    assert html.count('class="tok"') == len(found)
    assert "<style>" in html
    frame = found.to_pandas()
    assert list(frame.columns) == ["position", "token", "latent", "value", "share", "label"]
    assert frame["latent"].tolist() == [one.latent for token in found for one in token.latents]


def test_html_escapes_what_comes_from_texts_and_labels() -> None:
    evil = '<script>alert("x")</script>'
    found = TextFeatures((TokenFeatures(1, evil, (Active(ls.Feature(SITE, 3), 1.0, 2.0, evil),)),))
    assert "<script" not in found._repr_html_()
    silent = TextFeatures((TokenFeatures(0, " sea", ()),))
    assert repr(silent).splitlines()[1].strip() == "sea"


def test_without_pandas_one_line_says_so(session: ls.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="pandas"):
        session.features(TEXT).to_pandas()


# Finding


def test_search_by_words_then_by_what_fires(session: ls.Session) -> None:
    words = session.search("kitchen")
    assert words.by == "words"
    assert {hit.label for hit in words} == {"kitchens"}
    assert [hit.value for hit in words] == sorted((hit.value for hit in words), reverse=True)
    prompts = session.search("the storm tore the roof", n=5)
    assert prompts.by == "prompts"
    assert len(prompts) == 5
    share = (by_hand(session, "the storm tore the roof")[1:].amax(0) / session.saes[0].max_values).nan_to_num(0).clamp(max=1)
    assert prompts[0].value == pytest.approx(float(share.max()), rel=1e-5)
    against = session.search("  ", positive=TEXT, negative=[SENTENCES[2]], n=3)
    assert against.by == "prompts"
    plain = session.search(positive=[TEXT], n=40)
    assert against[0].value <= {hit.latent: hit.value for hit in plain}[against[0].latent]
    assert repr(against).splitlines()[1].split() == ["latent", "score", "token", "label"]
    assert "<table>" in words._repr_html_()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"text": " "},
        {"text": "sea", "positive": ["sea"]},
        {"negative": ["sea"]},
        {"text": "sea", "negative": ["sky"]},
    ],
)
def test_search_wants_words_or_prompts(session: ls.Session, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive"):
        session.search(**how)


def test_a_card_says_what_is_known(session: ls.Session) -> None:
    latent = session.search("storms")[0].latent
    card = session.feature(latent)
    top = session.saes[0].top
    assert card.statistics == top.statistics(latent)
    assert card.label == "storms at sea"
    assert list(card.sentences) == top.sentences(latent)[: len(card.sentences)]
    text, html = repr(card), card._repr_html_()
    for piece in ("storms at sea", SITE, card.sentences[0].text, "' rain'", f"{card.neighbours[0].latent} ("):
        assert piece in text
    for piece in ("storms at sea", 'class="tok"', "rain", f"<td>{card.neighbours[0].latent}</td>"):
        assert piece in html
    assert "<button" not in html, "a notebook has nothing to click"
    for unknown in (48, -1):
        with pytest.raises(ValueError, match=f"latent {unknown}: expected one of 0 to 47"):
            session.feature(unknown)


# Writing


def test_completions_are_those_of_the_model_and_of_the_terminal(
    paths: Features, session: ls.Session, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = session.complete("the storm", max_new_tokens=8, temperature=0)
    sampling = Sampling(max_new_tokens=8, temperature=0, repetition_penalty=1.1)
    model, tokenizer = load_model(paths.model), load_tokenizer(paths.model)
    assert [plain.text] == complete(model, tokenizer, ["the storm"], sampling)
    steered = session.steer({3: 12, 5: "ablate"}).complete("the storm", seed=4)
    record = run_terminal(paths, capsys, "--prompt", "the storm", "--steer", "3:12,5:ablate", "--seed", "4")
    assert (steered.text, steered.finished) == (record["completion"], record["finished"])
    assert steered.text != session.complete("the storm", seed=4).text
    several = session.steer("3:12,5:ablate").complete(["she read", "the storm"], seed=4)
    assert [one.prompt for one in several] == ["she read", "the storm"]


def test_a_stream_is_the_completion_piece_by_piece(session: ls.Session) -> None:
    steered = session.steer({3: 2.5})
    assert "".join(steered.stream("the storm", seed=1)) == steered.complete("the storm", seed=1).text
    said = [{"role": "user", "content": "hello"}]
    assert "".join(session.stream(said, style="plain", seed=1)).strip() == session.chat(said, "plain", seed=1).text
    with pytest.raises(ValueError, match="temperature"):
        session.stream("the storm", temperature=-1)  # not only once a piece is asked for


def test_chat_answers_as_the_terminal_does(
    paths: Features, session: ls.Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = [("system", "Be kind."), "the storm"]
    answer = session.steer({3: 12}).chat(said, seed=2, max_new_tokens=12)
    lines: Iterator[str | None] = iter(["the storm", None])
    monkeypatch.setattr(inference.chat, "_ask", lambda config: next(lines))
    flags = ["--system", "Be kind.", "--steer", "3:12", "--seed", "2", "--max-new-tokens", "12", "--json"]
    inference.chat.run(parse(ChatConfig, "", [*paths.flags, *flags]), alone())
    assert json.loads(capsys.readouterr().out)["answer"] == answer.text
    stopped = session.steer({3: 12}).chat(said, seed=2, max_new_tokens=12, stop_ids=frozenset(answer.ids[-3:]))
    assert len(stopped.ids) < len(answer.ids)
    for bad in ([], [("system", "Be kind.")], [{"role": "user"}], [("king", "hello")]):
        with pytest.raises(ValueError, match="message"):
            session.chat(bad)


def test_watching_reads_what_the_terminal_reads(
    paths: Features, session: ls.Session, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = session.steer({3: 12}).watch([3, 5], "the storm", alarm=0.5, max_new_tokens=6, temperature=0)
    flags = ["--prompt", "the storm", "--steer", "3:12", "--max-new-tokens", "6", "--temperature", "0"]
    record = run_terminal(paths, capsys, *flags, "--watch", "3,5", "--alarm", "0.5")
    assert watched.alarms
    assert {key: record[key] for key in watched.record()} == watched.record()
    assert repr(watched).splitlines()[2].split() == ["token", "#3", "#5"]
    with pytest.raises(ValueError, match="one SAE"):
        session.watch([], "the storm")


# Steering


def test_edits_are_given_as_a_mapping_as_text_as_a_recipe_or_as_a_file(session: ls.Session, tmp_path: Path) -> None:
    by_mapping = session.steer({3: 1.5, 5: "ablate", 7: "-2:clamp:generated"})
    file = tmp_path / "recipe.json"
    file.write_text(by_mapping.recipe.to_json())
    for given in ("3:1.5,5:ablate,7:-2:clamp:generated", by_mapping.recipe, file, str(file)):
        assert session.steer(given).recipe == by_mapping.recipe
    assert "latent 3" in repr(by_mapping)
    assert "-2 times its maximum, positions: generated" in repr(by_mapping)
    for bad in ({3: "sideways"}, {48: 1.0}, {3: float("nan")}, {"a": 1.0}, {True: 1.0}, {3: 1e9}):
        with pytest.raises(ValueError, match=r"latent|LATENT"):
            session.steer(bad)  # type: ignore[arg-type]


def test_features_of_several_saes_name_their_site(two: ls.Session) -> None:
    found = two.features(TEXT, n=5)
    assert {one.feature.site for token in found for one in token.latents} == {SITE, EARLIER}
    assert repr(found).split()[:4] == ["token", "site", "latent", "value"]
    only = two.features(TEXT, site=EARLIER)
    assert {one.feature.site for token in only for one in token.latents} == {EARLIER}
    hits = two.search(positive=[TEXT], n=4)
    assert [hit.feature.site for hit in hits] == [SITE, EARLIER] * 2
    card = two.feature(hits[1].feature)
    assert card.feature == hits[1].feature
    recipe = two.steer({hits[1].feature: 1.0, 3: 2.0}).recipe
    first, second = (features.sae.weights_hash for features in two.saes)
    assert [recipe.sae_of(edit) for edit in recipe.edits] == [second, first]
    assert two.steer({3: 2.0}).recipe == Recipe((Edit(latent=3, strength=2.0),), first)
    with pytest.raises(ValueError, match="one SAE"):
        two.watch([hits[0].feature, hits[1].feature], "the storm")
    assert two.watch([hits[1].feature], "the storm", max_new_tokens=2).maxima[0] == pytest.approx(card.statistics.max)


# Opening


def test_a_session_without_an_sae_still_captures_and_completes(bare: ls.Session) -> None:
    assert bare.capture(TEXT, SITE).shape[1] == bare.model.params.dim
    assert bare.complete("the storm", max_new_tokens=2).finished
    assert "no SAE" in repr(bare)
    for needs in (lambda: bare.features(TEXT), lambda: bare.capture(TEXT), lambda: bare.steer({3: 1.0}), lambda: bare.sae):
        with pytest.raises(ValueError, match="no SAE is loaded"):
            needs()


def test_what_does_not_belong_together_is_refused(paths: Features, earlier: Features) -> None:
    with pytest.raises(ValueError, match="top"):
        ls.open(paths.model, sae=paths.sae)
    with pytest.raises(ValueError, match=r"layers\.0\.resid_post"):
        ls.open(paths.model, sae=paths.sae, top=earlier.top)
    with pytest.raises(ValueError, match="nowhere"):
        ls.open("nowhere/at/all")


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text_has_no_features(session: ls.Session, text: str) -> None:
    if not text:
        with pytest.raises(ValueError, match="empty"):
            session.features(text)
    else:
        assert len(session.features(text)) == len(session.tokens(text)) - 1


# SAEs from anywhere


def test_an_sae_is_loaded_from_our_folder_and_another_librarys(paths: Features, tmp_path: Path) -> None:
    ours = ls.load_sae(paths.sae)
    assert ours.site == SITE
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, data in FORMATS["saelens"].write(ours).items():
        (theirs / name).write_bytes(data)
    x = torch.randn(5, ours.cfg.d_model)
    with torch.no_grad():
        torch.testing.assert_close(ls.load_sae(str(theirs))(x), ours(x), atol=1e-4, rtol=1e-4)
    assert ls.load_sae("demo").site == "layers.4.resid_post"
    with pytest.raises(ValueError, match="nothing"):
        ls.load_sae(tmp_path / "nothing")


class Hub:
    """A repository on the Hub, kept in a folder; remembers what was fetched."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.fetched = root, list[str]()
        monkeypatch.setattr("huggingface_hub.list_repo_files", self.names)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.fetch)

    def names(self, repository: str) -> list[str]:
        assert repository == "owner/name"
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def fetch(self, repository: str, allow_patterns: list[str]) -> str:
        self.fetched += allow_patterns
        return str(self.root)

    def put(self, folder: str, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            path = self.root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def test_an_sae_of_the_hub_is_fetched_without_its_neighbours(
    paths: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, ours = Hub(tmp_path, monkeypatch), ls.load_sae(paths.sae)
    files = FORMATS["sparsify"].write(ours)
    hub.put("layers.1", files)
    hub.put("", {"README.md": b"hello"})
    assert ls.load_sae("owner/name").cfg.n_latents == ours.cfg.n_latents, "there is only one"
    assert hub.fetched == sorted(f"layers.1/{name}" for name in files)
    hub.put("layers.2", files)
    hub.put("", {"config.json": b"{}"})
    hub.fetched.clear()
    assert ls.load_sae("owner/name/layers.2").cfg.n_latents == ours.cfg.n_latents
    assert hub.fetched == ["config.json", *sorted(f"layers.2/{name}" for name in files)]
    with pytest.raises(ValueError, match=r"2 SAEs.*owner/name/layers\.1, owner/name/layers\.2"):
        ls.load_sae("owner/name")
    with pytest.raises(ValueError, match=r"layers\.9.*owner/name/layers\.1"):
        ls.load_sae("owner/name/layers.9")


def test_an_sae_at_the_top_of_a_repository(paths: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, ours = Hub(tmp_path, monkeypatch), ls.load_sae(paths.sae)
    hub.put("other", {"weights.bin": b"large"})
    with pytest.raises(ValueError, match=r"no SAE.*weights\.bin"):
        ls.load_sae("owner/name")
    hub.put("", FORMATS["sparsify"].write(ours))
    assert ls.load_sae("owner/name").cfg.n_latents == ours.cfg.n_latents
    assert "other/weights.bin" not in hub.fetched


def test_a_repository_in_the_cache_needs_no_network(paths: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, monkeypatch)
    hub.put("layers.1", FORMATS["sparsify"].write(ls.load_sae(paths.sae)))

    def offline(repository: str) -> list[str]:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.list_repo_files", offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **how: str(tmp_path))
    assert ls.load_sae("owner/name").site


def test_a_copy_with_other_weights_is_accepted_on_request_and_measured(
    paths: Features, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "unquantised"
    shutil.copytree(paths.model, other)
    weights = load_file(other / "consolidated.safetensors")
    name = "layers.0.attention.wq.weight"
    save_file(weights | {name: weights[name] * 1.01}, other / "consolidated.safetensors")
    folders = (paths.sae, paths.top)
    with pytest.raises(ValueError, match="model_hash is "):
        ls.open(other, *folders, device="cpu")
    session = ls.open(other, *folders, device="cpu", other_weights=True)
    reported = re.search(r"other weights; FVU ([\d.]+) on (\d+) stored sentences", caplog.text)
    assert reported
    # The slow twin: row by row, on the sentences that it says.
    texts = list(
        dict.fromkeys(s.text for latent in range(session.sae.cfg.n_latents) for s in session.saes[0].top.sentences(latent, n=1))
    )
    rows = torch.cat([session.capture(text)[1:] for text in texts])
    residual = sum(float((row - session.sae(row[None])[0]).square().sum()) for row in rows)
    variance = sum(float((row - rows.mean(0)).square().sum()) for row in rows)
    assert int(reported[2]) == len(texts) > 3
    assert float(reported[1]) == pytest.approx(residual / variance, abs=6e-4)
    caplog.clear()
    ls.open(paths.model, *folders, device="cpu", other_weights=True)
    assert "other weights" not in caplog.text

"""Feature search: prompts, words and directions, each against a slow and obvious twin; and the command line."""

import json
import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from core.cli import parse
from core.runtime import Runtime, Solo
from interpretability import search, top_sentences
from interpretability.evidence.coactivation import together
from interpretability.opening import check_sae, open_explanations_of, open_top_of
from interpretability.records import Explanation, open_top
from interpretability.search import SearchConfig, nearest, neighbours, search_prompts, search_text
from interpretability.top_sentences import TopSentencesConfig
from llama3 import Tokenizer, Transformer, load_model, load_tokenizer
from sae.model import SAE, load
from tests.interp_folders import make_folders, random_texts
from tests.tiny import tiny_llama
from tests.tiny_features import SENTENCES, Features, alone, tiny_sae, write_features

SITE = "layers.1.resid_post"
POSITIVE = ["the storm tore the roof", "rain fell on the harbour all night and the sea rose"]
NEGATIVE = ["stir the soup", "the vote was close", "he counted the stars"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Features:
    root = tmp_path_factory.mktemp("features")
    model = tiny_llama(root / "model")
    return write_features(root, model, tiny_sae(model, SITE))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Top sentences of the stage itself, one each, with a background of every sentence."""
    root = tmp_path_factory.mktemp("written")
    found = make_folders(root, random_texts(24, seed=3), n_latents=24, k=3)
    flags = ["--n", "1", "--n-level", "0", "--aggregations", "max", "--sample-sentences", "24"]
    top_sentences.run(parse(TopSentencesConfig, "", [*found.flags(), "--out", str(root / "top"), *flags]), alone())
    return root / "top"


@pytest.fixture(scope="module")
def model(folders: Features) -> Transformer:
    return load_model(folders.model)


@pytest.fixture(scope="module")
def tokenizer(folders: Features) -> Tokenizer:
    return load_tokenizer(folders.model)


@pytest.fixture(scope="module")
def sae(folders: Features) -> SAE:
    return load(folders.sae)


@pytest.fixture(scope="module")
def maxima(folders: Features, sae: SAE) -> torch.Tensor:
    """Those of the corpus, which has some far below what the prompts reach, with some latents declared dead."""
    values = torch.tensor(open_top_of(sae, folders.top).max_values)
    values[[3, 11, 40]] = 0
    return values


def brute_share(
    sae: SAE, model: Transformer, tokenizer: Tokenizer, maxima: torch.Tensor, prompt: str, where: dict[int, tuple[float, str]]
) -> dict[int, float]:
    """Each latent's share in one prompt: a loop over tokens and over every latent, through the dense pre-activations.

    In `where`, the largest share of all prompts so far and its token.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    rows = model.capture(torch.tensor([ids]), sites=[SITE])[SITE][0]
    share = dict.fromkeys(range(len(maxima)), 0.0)
    for position in range(1, len(ids)):
        h = sae.pre_activations(sae.normalise(rows[position : position + 1]).z)[0].tolist()
        for latent in sorted(range(len(h)), key=lambda i: -h[i])[: sae.cfg.k]:
            if maxima[latent] > 0 and h[latent] > 0:
                value = min(1.0, h[latent] / float(maxima[latent]))
                share[latent] = max(share[latent], value)
                if value > where.get(latent, (0.0, ""))[0]:
                    where[latent] = (value, tokenizer.decode([ids[position]]))
    return share


@pytest.mark.parametrize("negative", [NEGATIVE, []])
@pytest.mark.parametrize("method", ["mean", "rank"])
def test_prompts_equal_brute_force(
    sae: SAE,
    model: Transformer,
    tokenizer: Tokenizer,
    maxima: torch.Tensor,
    negative: list[str],
    method: search.Method,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "RANK_TOP", 7)
    expected: dict[int, list[float]] = {latent: [0.0, 0.0, 0.0, 0.0] for latent in range(len(maxima))}
    where: tuple[dict[int, tuple[float, str]], ...] = ({}, {})
    for side, prompts in enumerate((POSITIVE, negative)):
        for prompt in prompts:
            share = brute_share(sae, model, tokenizer, maxima, prompt, where[side])
            for latent, value in share.items():
                expected[latent][side] += value / len(prompts)
            for latent in sorted(share, key=lambda i: (-share[i], i))[:7]:
                expected[latent][2 + side] += share[latent] > 0
    first = 2 if method == "rank" else 0
    wanted = {i: (e[first] - e[first + 1], e[0] - e[1], e[first], e[first + 1]) for i, e in expected.items()}
    order = [i for i in wanted if wanted[i][2] or wanted[i][3]]
    order.sort(key=lambda i: (-wanted[i][0], -wanted[i][1], i))
    found = search_prompts(sae, model, tokenizer, SITE, maxima, POSITIVE, negative, method)
    assert [hit.latent for hit in found] == order
    assert len(order) > 10
    assert not {3, 11, 40} & set(order)
    for hit in found:
        assert hit[1:4] == pytest.approx((wanted[hit.latent][0], *wanted[hit.latent][2:]), abs=1e-5)
        assert hit.token == (where[0] if hit.latent in where[0] else where[1])[hit.latent][1]
    if negative:
        assert found[-1].score < 0 < found[0].score


def test_dead_latents_never_rank_however_strongly_they_fire(
    sae: SAE, model: Transformer, tokenizer: Tokenizer, maxima: torch.Tensor
) -> None:
    best = search_prompts(sae, model, tokenizer, SITE, maxima, POSITIVE)[0].latent
    dead = maxima.clone()
    dead[best] = 0
    assert best not in [hit.latent for hit in search_prompts(sae, model, tokenizer, SITE, dead, POSITIVE)]


def test_position_0_is_left_out(sae: SAE, model: Transformer, tokenizer: Tokenizer, maxima: torch.Tensor) -> None:
    """What the SAE makes of BOS, the same in every prompt, changes no score: a hook that turns its row upside down shows it."""

    def invert_first(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([-1000 * x[:, :1], x[:, 1:]], dim=1)

    before = search_prompts(sae, model, tokenizer, SITE, maxima, POSITIVE, NEGATIVE)
    with model.hooks({SITE: invert_first}):
        assert search_prompts(sae, model, tokenizer, SITE, maxima, POSITIVE, NEGATIVE) == before


def test_a_word_counts_the_same_in_a_long_prompt(
    sae: SAE, model: Transformer, tokenizer: Tokenizer, maxima: torch.Tensor
) -> None:
    """A prompt that goes on only adds: causal attention leaves earlier tokens as they were, and the largest value counts."""
    short, long = (
        {hit.latent: hit.score for hit in search_prompts(sae, model, tokenizer, SITE, maxima, [prompt])}
        for prompt in ("the storm", "the storm and then the long quiet afternoon")
    )
    assert all(long[latent] >= score - 1e-5 for latent, score in short.items())


@pytest.mark.parametrize(
    ("positive", "message"),
    [([], "at least one"), ([" \n"], "a prompt is empty"), (["storm " * 200], "the context holds 128")],
)
def test_bad_prompts_are_refused(
    sae: SAE, model: Transformer, tokenizer: Tokenizer, maxima: torch.Tensor, positive: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        search_prompts(sae, model, tokenizer, SITE, maxima, positive)


def test_maxima_of_another_sae_are_refused(sae: SAE, model: Transformer, tokenizer: Tokenizer, maxima: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="48 latents, found 47"):
        search_prompts(sae, model, tokenizer, SITE, maxima[1:], POSITIVE)


def explained(latent: int, title: str, text: str = "", score: float | None = None, **more: object) -> Explanation:
    fields = {"state": "valid", "method": "test", "model": ""} | more
    return Explanation(latent=latent, title=title, explanation=text, score=score, **fields)  # type: ignore[arg-type]


EXPLANATIONS = {
    item.latent: item
    for item in (
        explained(0, "kitchens", "soup, and a storm in a teacup", 0.99),
        explained(1, "Storms at sea", "ships", 0.6),
        explained(2, "storm warnings", "radio, sea and wind", 0.9),
        explained(3, "storms", "", 0.6),
        explained(4, "weather", "", 1.0, details={"tokens": [{"text": " Storm"}, "sea"], "n": 12, "storm_score": "low"}),
        explained(5, "storm", "sea", 1.0, state="failed"),
        explained(6, "brainstorming", "seafood", certainty=0.7),
        explained(7, "Straße und Übermut", "日本 の 冬"),
        explained(8, "rain", details={"storm_score": 1}),
    )
}


@pytest.mark.parametrize(
    ("query", "latents"),
    [
        ("storm", [2, 1, 3, 0, 4]),  # titles by score, then latent; then the explanation; then details, whatever their scores
        ("STO", [2, 1, 3, 0, 4]),
        ("storm sea", [1, 2, 4]),  # both in the title; title and explanation; details
        ("sea, storm!", [1, 2, 4]),
        ("sea", [1, 2, 6, 4]),
        ("storming", []),
        ("zebra", []),
        ("STRASSE", [7]),
        ("übermut 日", [7]),
        ("ＲＡＩＮ", [8]),
        ("...", []),
        ("", []),  # `shown_first` orders all
    ],
)
def test_text_search_ranks_title_before_explanation_before_details(query: str, latents: list[int]) -> None:
    assert [match.latent for match in search_text(EXPLANATIONS, query, 20)] == latents
    assert [match.latent for match in search_text(EXPLANATIONS, query, 2)] == latents[:2]


def test_text_search_says_where_and_how_far_to_trust() -> None:
    found = search_text(EXPLANATIONS, "sea", 20)
    assert [match.field for match in found] == ["title", "explanation", "explanation", "details"]
    assert [match.score for match in found] == [0.6, 0.9, 0.7, 1.0]


def test_neighbours_equal_the_full_cosine_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, of both sides, whose sizes divide nothing; two equal rows and one of zeros."""
    W_dec = torch.randn(53, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 54)[:, None]
    W_dec[20], W_dec[31] = W_dec[7], 0
    cosine = torch.nn.functional.cosine_similarity(W_dec[:, None].double(), W_dec[None].double(), dim=2)
    monkeypatch.setattr(search, "BLOCK_ELEMENTS", 212)  # 4 latents against 26 rows
    indices, values = nearest(W_dec, torch.arange(53), 52)
    assert indices.shape == values.shape == (53, 52)
    for latent in range(53):
        others = [i for i in range(53) if i != latent]
        assert sorted(indices[latent].tolist()) == others
        torch.testing.assert_close(values[latent].double(), cosine[latent, indices[latent]], atol=1e-6, rtol=0)
        assert values[latent].tolist() == sorted(values[latent].tolist(), reverse=True)
        order = sorted(others, key=lambda i: (-round(float(cosine[latent, i]), 5), i))
        assert [n.latent for n in neighbours(W_dec, latent, 5)] == order[:5]
    assert neighbours(W_dec, 7, 1)[0].latent == 20
    assert len(neighbours(W_dec, 0, 1000)) == 52
    assert neighbours(W_dec[:1], 0, 3) == []
    assert [t.shape for t in nearest(W_dec, torch.arange(0), 3)] == [(0, 3), (0, 3)]
    with pytest.raises(ValueError, match="0 to 52"):
        neighbours(W_dec, 53, 3)


def test_neighbours_of_half_precision_rows_are_computed_in_float32() -> None:
    W_dec = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert neighbours(W_dec, 2, 6) == neighbours(W_dec.float(), 2, 6)


def test_together_finds_each_sentence_that_is_stored_for_all(folders: Features, sae: SAE) -> None:
    """The folder stores every sentence of its corpus for every latent that fires there, so the dense rows are the truth."""
    top = open_top_of(sae, folders.top)
    dense = {i: {row.sentence_id: row.value / top.max_values[i] for row in top.sentences(i)} for i in range(top.n_latents)}
    pairs = [(i, j) for i in range(0, 48, 3) for j in range(48) if i != j]
    met = 0
    for i, j in pairs:
        shared = {s: (dense[i][s], dense[j][s]) for s in dense[i] if s in dense[j]}
        order = sorted(shared, key=lambda s: (-min(shared[s]), s))
        found = together(top, [i, j])
        assert [row.sentence_id for row in found] == order
        for row in found:
            assert row.shares == pytest.approx(shared[row.sentence_id])
            assert row.share == min(row.shares)
            assert row.text == SENTENCES[row.sentence_id]
        met += len(found)
    assert met > 100
    assert {row.sentence_id for row in together(top, [0, 1, 2])} == dense[0].keys() & dense[1].keys() & dense[2].keys()


def test_together_reads_the_background_too(written: Path) -> None:
    """Latents whose top lists are cut to one sentence meet in the background alone, with what fires there."""
    top = open_top(written)
    meets: dict[tuple[int, int], set[int]] = {}
    for sentence in top.background():
        for i, j in combinations(sorted(set(sentence.latents.tolist())), 2):
            meets.setdefault((i, j), set()).add(sentence.sentence_id)
    assert meets
    for (i, j), ids in list(meets.items())[:20]:
        assert ids <= {row.sentence_id for row in together(top, [i, j])}


@pytest.mark.parametrize(("latents", "message"), [([3], "two latents or more"), ([3, 3], "each once"), ([0, 48], "0 to 47")])
def test_together_refuses_what_it_cannot_compare(folders: Features, sae: SAE, latents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        together(open_top_of(sae, folders.top), latents)


def test_parts_that_do_not_belong_together_are_refused(
    folders: Features, sae: SAE, model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert check_sae(sae, folders.sae, model, tokenizer) == SITE
    other_path = tiny_llama(tmp_path / "other", seed=1)
    other, other_tokenizer = load_model(other_path), load_tokenizer(other_path)
    with pytest.raises(ValueError, match=f"model_hash is '{model.weights_hash}', but '{other.weights_hash}'"):
        check_sae(sae, folders.sae, other, other_tokenizer)
    second = write_features(tmp_path / "second", folders.model, tiny_sae(folders.model, SITE, seed=5))
    for opener, path in ((open_top_of, second.top), (open_explanations_of, second.explanations)):
        with pytest.raises(ValueError, match=f"{path.name}.*sae_hash is '.*', but '{sae.weights_hash}' is needed"):
            opener(sae, path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "one of --positive"),
        ("--latent 1 --text a --explanations e", "one of --positive"),
        ("--latent 1 --latents 1 2", "one of --positive"),
        ("--latents 1 2", "--top is missing"),
        ("--latent 1 --negative a", "give --positive too"),
        ("--positive a --top t", "--model is missing"),
        ("--positive a --model m", "--top is missing"),
        ("--text a", "--explanations is missing"),
        ("--latent 1 --n 0", "--n must be at least 1"),
        ("--latent 1 --method best", "method"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_read(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(SearchConfig, "", ["--sae", "nowhere", *flags.split()])


def test_command_line(folders: Features, sae: SAE, launch: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    """Prompts as JSON through the installed command; what it prints is what the function returns."""
    done = launch(
        "-m", "interpretability.search", "--threads", 1, "--device", "cpu", *folders.flags, "--json", "--n", 3,
        "--positive", *POSITIVE, "--negative", *NEGATIVE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    top = open_top_of(sae, folders.top)
    model, tokenizer = load_model(folders.model), load_tokenizer(folders.model)
    found = search_prompts(sae, model, tokenizer, SITE, torch.tensor(top.max_values), POSITIVE, NEGATIVE)[:3]
    assert [row["latent"] for row in rows] == [hit.latent for hit in found]
    assert [row["score"] for row in rows] == pytest.approx([hit.score for hit in found], abs=1e-5)
    titles = open_explanations_of(sae, folders.explanations)
    assert [row["title"] for row in rows] == [titles[hit.latent].title for hit in found]


def test_tables_and_one_line_errors(folders: Features, sae: SAE, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = Runtime(0, 1, torch.device("cpu"), Solo())

    def asked(**flags: Any) -> SearchConfig:
        return SearchConfig(sae=folders.sae, explanations=folders.explanations, **flags)

    search.run(asked(text="storms", n=2), runtime)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["latent", "field", "score", "title"]
    assert len(lines) == 3
    assert all("storms at sea" in line and "title" in line for line in lines[1:])
    search.run(asked(latent=5, n=4), runtime)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[1:]] == [hit.latent for hit in neighbours(sae.W_dec, 5, 4)]
    search.run(asked(latents=(0, 1), top=folders.top), runtime)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["share", "shares", "sentence_id", "text"]
    assert len(lines) - 1 == len(together(open_top_of(sae, folders.top), [0, 1])) > 0
    search.run(asked(text="zebra"), runtime)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="latent 48: expected one of 0 to 47"):
        search.run(asked(latent=48), runtime)

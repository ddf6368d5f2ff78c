"""The sampling loop against plain loops: greedy and sampled text, batches, padding, stops, hooks per step, limits.

Shapes: B rows, T tokens of a pass, V vocabulary.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama3 import ModelArgs, Piece, Sampling, Tokenizer, Transformer, complete, generate, load_model, load_tokenizer
from llama3.generate import CANDIDATES, Chooser, candidates
from llama3.sites import Hook
from llama3.tokenizer import special_tokens
from tests.tiny import tiny_llama

GREEDY = Sampling(max_new_tokens=12, temperature=0)
PROMPTS = ["the other one", "a", "In the beginning there was a long, long prompt", "hello"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Tokenizer]:
    folder = tiny_llama(tmp_path_factory.mktemp("tiny"), seed=3)
    return load_model(folder), load_tokenizer(folder)


@pytest.fixture
def model(pair: tuple[Transformer, Tokenizer]) -> Transformer:
    return pair[0]


@pytest.fixture
def tokenizer(pair: tuple[Transformer, Tokenizer]) -> Tokenizer:
    return pair[1]


@pytest.fixture
def ids(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]


def by_row(pieces: Any, n_rows: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = [[] for _ in range(n_rows)]
    for piece in pieces:
        rows[piece.row].append(piece)
    return rows


def reference_greedy(model: Transformer, prompt: Sequence[int], n: int) -> list[int]:
    """The whole sequence through the model for every token: no cache, no batch."""
    out = list(prompt)
    for _ in range(n):
        out.append(int(model(torch.tensor([out]))[0, -1].argmax()))
    return out[len(prompt) :]


@pytest.mark.parametrize("site", ["layers.1.attn_heads", "layers.1.ffn_hidden"])
def test_edits_inside_a_layer_reach_every_pass(site: str, tmp_path: Path) -> None:
    """Four lengths in one batch with a cache, against whole passes under the same edit; heads wider than the model."""
    folder = tiny_llama(tmp_path, seed=3, head_dim=12)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = [tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
    shift = torch.randn(model.width(site), generator=torch.Generator().manual_seed(5))
    edit: Mapping[str, Hook] = {site: lambda x: x + shift}
    texts = [[p.token_id for p in row] for row in by_row(generate(model, tokenizer, ids, GREEDY, lambda _: edit), 4)]
    with model.hooks(edit):
        assert texts == [reference_greedy(model, prompt, 12) for prompt in ids]
    assert texts != [[p.token_id for p in row] for row in by_row(generate(model, tokenizer, ids, GREEDY), 4)]


# --- text -----------------------------------------------------------------------------------------------------------------


def test_greedy_is_the_most_likely_token_of_the_whole_pass(
    model: Transformer, tokenizer: Tokenizer, ids: list[list[int]]
) -> None:
    """In one batch of four lengths; the tiny model writes no end token here, or rows would be shorter than 12."""
    rows = by_row(generate(model, tokenizer, ids, GREEDY), 4)
    for prompt, pieces in zip(ids, rows, strict=True):
        assert [piece.token_id for piece in pieces] == reference_greedy(model, prompt, 12)
        assert [piece.position for piece in pieces] == list(range(len(prompt), len(prompt) + 12))
        assert [piece.finished for piece in pieces] == [""] * 11 + ["length"]
        assert "".join(piece.text for piece in pieces) == tokenizer.decode([piece.token_id for piece in pieces])


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5, "top_p": 1.0}, {"min_p": 0.1}, {"repetition_penalty": 1.3}, {"top_p": 1.0}],
    ids=["top-p", "top-k", "min-p", "repetition penalty", "no filter"],
)
def test_text_of_a_row_does_not_depend_on_its_neighbours(
    options: dict[str, Any], model: Transformer, tokenizer: Tokenizer, ids: list[list[int]]
) -> None:
    """Row 0 alone, before short and before long neighbours; the others differ, as their prompts do."""
    sampling = Sampling(max_new_tokens=16, **options)
    alone = [piece.token_id for piece in generate(model, tokenizer, ids[:1], sampling)]
    for neighbours in (ids[1:], ids[1:2], ids[2:3] * 3):
        rows = by_row(generate(model, tokenizer, [ids[0], *neighbours], sampling), 1 + len(neighbours))
        assert [piece.token_id for piece in rows[0]] == alone


@pytest.mark.parametrize("temperature", [0, 0.8], ids=["greedy", "sampled"])
def test_texts_part_only_where_the_best_tokens_are_equally_likely(
    temperature: float, model: Transformer, tokenizer: Tokenizer
) -> None:
    """60 rows of random tokens and lengths in one batch, and each alone; a sampled text may also part where the number drawn
    falls between two tokens, so of those only few are allowed to."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 60, (60,), generator=generator).tolist()
    prompts = [torch.randint(0, tokenizer.n_vocab, (n,), generator=generator).tolist() for n in lengths]
    sampling = Sampling(max_new_tokens=20, temperature=temperature)
    parted = 0
    for row, pieces in enumerate(by_row(generate(model, tokenizer, prompts, sampling), 60)):
        single = replace(sampling, first_row=row)
        alone = [piece.token_id for piece in generate(model, tokenizer, prompts[row : row + 1], single)]
        together = [piece.token_id for piece in pieces]
        if together != alone:
            parted += 1
            at = next(i for i, (a, b) in enumerate(zip(together, alone, strict=False)) if a != b)
            best = model(torch.tensor([prompts[row] + alone[:at]]))[0, -1].topk(2).values
            assert temperature or best[0] - best[1] < 1e-3
    assert parted <= 2


def test_seed_and_row_choose_the_text(model: Transformer, tokenizer: Tokenizer) -> None:
    same = complete(model, tokenizer, ["the"] * 3, Sampling(max_new_tokens=20))
    assert same == complete(model, tokenizer, ["the"] * 3, Sampling(max_new_tokens=20))
    assert len(set(same)) == 3, "equal prompts in one batch must not give equal texts"
    assert same != complete(model, tokenizer, ["the"] * 3, Sampling(max_new_tokens=20, seed=1))
    assert same[1:] == complete(model, tokenizer, ["the"] * 2, Sampling(max_new_tokens=20, first_row=1))


def test_the_global_generator_is_not_touched(model: Transformer, tokenizer: Tokenizer) -> None:
    before = torch.get_rng_state()
    complete(model, tokenizer, ["the"], Sampling(max_new_tokens=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_complete_is_the_text_of_generate(model: Transformer, tokenizer: Tokenizer, ids: list[list[int]]) -> None:
    rows = by_row(generate(model, tokenizer, ids, GREEDY), 4)
    assert complete(model, tokenizer, PROMPTS, GREEDY) == ["".join(piece.text for piece in row) for row in rows]
    without = [tokenizer.encode(prompt) for prompt in PROMPTS]
    rows = by_row(generate(model, tokenizer, without, GREEDY), 4)
    assert complete(model, tokenizer, PROMPTS, GREEDY, bos="none") == ["".join(piece.text for piece in row) for row in rows]


# --- a model that says what it is told ------------------------------------------------------------------------------------


class Script:
    """Stands in for the model: row i is to write `texts[i]`, then `ends[i]`, whatever it is fed; keeps what it was fed."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[Sequence[int]], max_seq_len: int = 64) -> None:
        self.params = ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=tokenizer.n_vocab, max_seq_len=max_seq_len)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._real = Transformer(self.params).requires_grad_(False)
        self.new_cache, self.hooks = self._real.new_cache, self._real.hooks
        self.texts, self.step = [list(text) for text in texts], 0
        self.fed: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, tokens: Tensor, mask: Tensor | None, cache: Any, last_only: bool) -> Tensor:
        self.fed.append((tokens, mask))
        cache.claim(tokens.shape[1], mask)
        logits = torch.zeros(len(self.texts), 1, self.params.vocab_size)
        for row, text in enumerate(self.texts):
            logits[row, 0, text[min(self.step, len(text) - 1)]] = 50.0
        self.step += 1
        return logits


def written(tokenizer: Tokenizer, texts: Sequence[Sequence[int]], **options: Any) -> list[list[Piece]]:
    script = Script(tokenizer, texts)
    sampling = Sampling(temperature=0, **({"max_new_tokens": 20} | options))
    return by_row(generate(script, tokenizer, [[tokenizer.bos_id]] * len(texts), sampling), len(texts))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """Every byte its own token, so that characters and stop strings spread over several."""
    return Tokenizer({bytes([b]): b for b in range(256)}, special_tokens(256))


@pytest.mark.parametrize("end", ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"])
def test_rows_end_at_their_own_end_tokens(bytewise: Tokenizer, end: str) -> None:
    stop = bytewise.special_tokens[end]
    rows = written(bytewise, [[*b"abc", stop], [*b"z", stop], [*b"long text, twelve"]], max_new_tokens=12)
    assert ["".join(piece.text for piece in row) for row in rows] == ["abc", "z", "long text, t"]
    assert [row[-1].finished for row in rows] == ["stop", "stop", "length"]
    assert [len(row) for row in rows] == [4, 2, 12]
    assert rows[0][-1].token_id == stop


def test_a_finished_row_is_fed_padding_at_no_position(bytewise: Tokenizer) -> None:
    script = Script(bytewise, [[*b"ab", bytewise.eos_id], [*b"abcdef"]])
    seen: list[list[list[int]]] = []

    def hooks_for(positions: Tensor) -> Mapping[str, Hook]:
        seen.append(positions.tolist())
        return {}

    prompts = [[bytewise.bos_id, 65], [bytewise.bos_id]]
    list(generate(script, bytewise, prompts, Sampling(max_new_tokens=5, temperature=0), hooks_for))  # type: ignore[arg-type]
    assert seen == [[[0, 1], [-1, 0]], [[2], [1]], [[3], [2]], [[-1], [3]], [[-1], [4]]]
    masks = [None if mask is None else mask.tolist() for _, mask in script.fed]
    assert masks == [[[True, True], [False, True]], None, None, [[False], [True]], [[False], [True]]]


@pytest.mark.parametrize(
    ("text", "stop", "expected", "finished"),
    [
        ("one two three", ("two",), "one ", "stop_string"),
        ("one two three", ("three", "two"), "one ", "stop_string"),
        ("aaab", ("aab",), "a", "stop_string"),
        ("ababc", ("abc",), "ab", "stop_string"),
        ("stop", ("stop",), "", "stop_string"),
        ("one tw", ("two",), "one tw", "length"),
        ("eins ä zwei", ("ä",), "eins ", "stop_string"),
        ("never", (), "never", "length"),
    ],
)
def test_stop_strings_cut_the_text_before_them(
    bytewise: Tokenizer, text: str, stop: tuple[str, ...], expected: str, finished: str
) -> None:
    """Also where they overlap themselves, span many tokens, or begin at the end of the text and never come."""
    (row,) = written(bytewise, [list(text.encode())], stop=stop, max_new_tokens=len(text.encode()))
    assert "".join(piece.text for piece in row) == expected
    assert row[-1].finished == finished


@settings(max_examples=60, deadline=None, database=None)
@given(st.text("ab é", min_size=1, max_size=12), st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_a_search_in_the_whole_text_finds_them(text: str, stop: list[str]) -> None:
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)}, special_tokens(256))
    (row,) = written(tokenizer, [list(text.encode())], stop=tuple(stop), max_new_tokens=len(text.encode()))
    # A stop string ends the row with the token that completes it, so of several the one that ends first counts.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    first_end = min(ends)[0] if ends else None
    expected = text[: min(at for end, at in ends if end == first_end)] if ends else text
    assert "".join(piece.text for piece in row) == expected


def test_streamed_text_never_shows_half_a_character_or_a_stop_string(bytewise: Tokenizer) -> None:
    (row,) = written(bytewise, [list("a👍STOP".encode())], stop=("STOP",))
    assert [piece.text for piece in row] == ["a", "", "", "", "👍", "", "", "", ""]


def test_text_held_back_comes_with_the_end(bytewise: Tokenizer) -> None:
    (row,) = written(bytewise, [[*b"xST", bytewise.eos_id]], stop=("STOP",))
    assert [piece.text for piece in row] == ["x", "", "", "ST"]
    (row,) = written(bytewise, [[*b"x", 0xF0]], max_new_tokens=2)
    assert [piece.text for piece in row] == ["x", "\ufffd"]


# --- choosing a token -----------------------------------------------------------------------------------------------------


def reference_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Each filter in turn over the whole vocabulary of one row, in float64."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    order = p.argsort(descending=True)
    keep = torch.zeros_like(p, dtype=torch.bool)
    keep[order[: sampling.top_k or len(p)]] = True
    p = p * keep / (p * keep).sum()
    mass = 0.0
    for index in order.tolist():
        if mass >= sampling.top_p:
            p[index] = 0
        mass += float(p[index])
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


FILTERS = [
    Sampling(), Sampling(top_p=1.0), Sampling(top_p=0.3), Sampling(top_p=1e-9), Sampling(top_k=1), Sampling(top_k=7, top_p=1.0),
    Sampling(top_k=20, top_p=0.5), Sampling(top_p=1.0, min_p=0.2), Sampling(top_p=0.9, min_p=0.05, temperature=2.0),
    Sampling(top_k=5000), Sampling(min_p=1.0), Sampling(temperature=0.05), Sampling(temperature=50.0),
]  # fmt: skip


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaked"])
def test_filters_keep_the_probabilities_of_the_reference(sampling: Sampling, spread: float) -> None:
    """With more tokens than CANDIDATES, so that both the short way and the full sort are taken."""
    logits = torch.randn(3, 2 * CANDIDATES, generator=torch.Generator().manual_seed(0)) * spread
    sums, ids = candidates(logits / sampling.temperature, sampling)
    shares = torch.diff(sums, dim=-1, prepend=torch.zeros(3, 1, dtype=torch.float64)) / sums[:, -1:]
    for row in range(3):
        found = torch.zeros(logits.shape[1], dtype=torch.float64).index_add(0, ids[row], shares[row])
        expected = reference_probabilities(logits[row], sampling)
        assert (found > 1e-9).sum() == (expected > 1e-9).sum()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_filters_agree_with_transformers() -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(1)) * 3
    theirs = logits
    for warper in (TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
        theirs = warper(None, theirs)  # type: ignore[arg-type]
    sums, ids = candidates(logits, Sampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.02))
    shares = torch.diff(sums, dim=-1, prepend=torch.zeros(4, 1, dtype=torch.float64)) / sums[:, -1:]
    ours = torch.zeros_like(logits).scatter(1, ids, shares.float())
    torch.testing.assert_close(ours, theirs.softmax(-1), rtol=1e-4, atol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely(bytewise: Tokenizer) -> None:
    """20,000 draws from one distribution, by 1,000 rows: each share within five standard deviations."""
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=20)
    chooser = Chooser(sampling, [[bytewise.bos_id]] * 1000, bytewise, torch.device("cpu"))
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = torch.full((1000, bytewise.n_vocab), float("-inf"))
    logits[:, 10:14] = p.log()
    drawn = torch.cat([chooser.choose(logits) for _ in range(20)]) - 10
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert ((shares - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_repetition_penalty_is_that_of_transformers(bytewise: Tokenizer) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, logits = [3, 7, 3], torch.randn(1, bytewise.n_vocab, generator=torch.Generator().manual_seed(2))
    logits[:, 256:] = float("-inf")  # special tokens, which we exempt
    chooser = Chooser(Sampling(temperature=0, repetition_penalty=1.7), [prompt], bytewise, torch.device("cpu"))
    seen = list(prompt)
    for _ in range(6):
        expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits).argmax()
        seen.append(int(chooser.choose(logits)))
        assert seen[-1] == expected
    assert len(set(seen[3:])) > 1, "the penalty must have changed a choice"


def test_ids_without_text_are_never_chosen() -> None:
    """A model may have more rows than the tokenizer has tokens, and a tokenizer holes in its ids."""
    ranks = {bytes([b]): b for b in range(256)} | {b"zz": 300}
    tokenizer = Tokenizer(ranks, special_tokens(310))
    assert tokenizer.unassigned == [*range(256, 300), *range(301, 310)]
    logits = torch.zeros(1, tokenizer.n_vocab + 5)
    logits[0, 256:310] = 90.0
    logits[0, 300], logits[0, -5:] = 5.0, 99.0
    for temperature in (0, 1e-3):
        chooser = Chooser(Sampling(temperature=temperature), [[0]], tokenizer, torch.device("cpu"))
        assert chooser.choose(logits).tolist() == [300]


# --- hooks ----------------------------------------------------------------------------------------------------------------


def test_hooks_are_asked_for_with_the_positions_of_each_pass(
    model: Transformer, tokenizer: Tokenizer, ids: list[list[int]]
) -> None:
    """An edit by position, in a padded batch with the cache, must equal the edit in a whole pass of the row alone."""
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3

    def edit_from(positions: Tensor, first: int) -> Mapping[str, Hook]:
        return {"layers.1.resid_post": lambda x: x + shift * (positions >= first)[..., None]}

    rows = by_row(generate(model, tokenizer, ids, GREEDY, lambda positions: edit_from(positions, 4)), 4)
    plain = by_row(generate(model, tokenizer, ids, GREEDY), 4)
    assert rows != plain
    for prompt, pieces in zip(ids, rows, strict=True):
        out = list(prompt)
        for piece in pieces:
            with model.hooks(edit_from(torch.arange(len(out))[None], 4)):
                assert piece.token_id == int(model(torch.tensor([out]))[0, -1].argmax())
            out.append(piece.token_id)
    assert by_row(generate(model, tokenizer, ids, GREEDY), 4) == plain


def test_hooks_are_gone_between_steps(model: Transformer, tokenizer: Tokenizer, ids: list[list[int]]) -> None:
    """What else the caller runs on the model between two pieces must not be edited, also when the iterator is given up."""
    tokens = torch.tensor(ids[:1])
    plain = model(tokens)
    pieces = generate(model, tokenizer, ids[:1], GREEDY, lambda positions: {"embed": torch.zeros_like})
    for _ in range(3):
        next(pieces)
        assert torch.equal(model(tokens), plain)
        assert torch.is_grad_enabled()
    del pieces
    assert torch.equal(model(tokens), plain)


def test_an_iterator_may_be_resumed_by_other_threads(model: Transformer, tokenizer: Tokenizer, ids: list[list[int]]) -> None:
    """As a web server does, which runs each step of a stream wherever a worker is free."""

    def hooks_for(positions: Tensor) -> Mapping[str, Hook]:
        return {"layers.0.resid_post": lambda x: x * 1.5}

    expected = list(generate(model, tokenizer, ids, GREEDY, hooks_for))
    pieces, found = generate(model, tokenizer, ids, GREEDY, hooks_for), []
    for _ in expected:
        thread = threading.Thread(target=lambda: found.append(next(pieces)))
        thread.start()
        thread.join()
    assert found == expected


def test_generations_at_once_share_nothing(model: Transformer, tokenizer: Tokenizer, ids: list[list[int]]) -> None:
    """Two iterators with different hooks, a step of one after a step of the other."""
    expected = [[p.token_id for p in generate(model, tokenizer, ids, GREEDY, hooks)] for hooks in (None, _doubled)]
    found: list[list[int]] = [[], []]
    for both in zip(*(generate(model, tokenizer, ids, GREEDY, hooks) for hooks in (None, _doubled)), strict=True):
        for out, piece in zip(found, both, strict=True):
            out.append(piece.token_id)
    assert found == expected
    assert expected[0] != expected[1]


def _doubled(positions: Tensor) -> Mapping[str, Hook]:
    return {"layers.1.attn_out": lambda x: x * 8}


# --- limits ---------------------------------------------------------------------------------------------------------------


def test_rows_end_where_their_own_context_is_full(model: Transformer, tokenizer: Tokenizer) -> None:
    """The context holds 128: a row of 126 has room for 2, and takes none of it from a short neighbour."""
    long, short = [tokenizer.bos_id] + [97] * 125, [tokenizer.bos_id, 98]
    sampling = Sampling(max_new_tokens=40, temperature=0)
    rows = by_row(generate(model, tokenizer, [long, short], sampling), 2)
    assert [len(row) for row in rows] == [2, 40]
    assert rows[0][-1].finished == "length"
    assert rows[0][-1].position == 127
    alone = list(generate(model, tokenizer, [short], sampling))
    assert [piece.token_id for piece in rows[1]] == [piece.token_id for piece in alone]
    endless = list(
        generate(model, tokenizer, [short], replace(sampling, max_new_tokens=10**12))
    )  # room is taken for the context
    assert len(endless) == 126
    assert [piece.token_id for piece in endless[:40]] == [piece.token_id for piece in alone]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt was given"),
        ([[5], []], "prompt 1 is empty; expected at least one token"),
        ([[5] * 128], "prompt 0 has 128 tokens and the context holds 128, the answer included; shorten the prompt"),
        ([[5, -1]], "prompt 0 holds a token id outside 0 to"),
        ([[5, 10**6]], "prompt 0 holds a token id outside 0 to"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_at_once(
    prompts: list[list[int]], message: str, model: Transformer, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, prompts, GREEDY)  # refused before the first piece is asked for


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = Transformer(ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=100))
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model 100; they do not belong together"):
        generate(small, tokenizer, [[1]], GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; found 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be .*; found nan"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be above 0, at most 1; found 1.01"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"min_p": 1.5}, "min_p must be 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be 0.01 to 100"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty must be 0.01 to 100"),
        ({"stop": ("a", "")}, "stop must be strings that are not empty"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_single_stop_string_is_a_tuple_of_one() -> None:
    assert Sampling(stop="END").stop == ("END",)  # type: ignore[arg-type]

"""The ends of sampling: tiny temperatures, logits that are no numbers, tokens exempt from penalties, further end tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llama3 import Sampling, Tokenizer, generate, load_model, load_tokenizer
from llama3.generate import MIN_TEMPERATURE, Chooser
from llama3.tokenizer import special_tokens
from tests.test_generate import GREEDY, written
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """A token for each byte, and Llama 3's special ones."""
    return Tokenizer({bytes([b]): b for b in range(256)}, special_tokens(256))


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-45, 1e-38, 1e-37, 1e-20, 1e-7])
def test_tiny_temperatures_are_greedy(bytewise: Tokenizer, temperature: float) -> None:
    """1e-38 is a float32, but a logit divided by it is none; all such temperatures mean the most likely token."""
    logits = torch.randn(8, bytewise.n_vocab, generator=torch.Generator().manual_seed(3)) * 30
    chooser = Chooser(Sampling(temperature=temperature), [[bytewise.bos_id]] * 8, bytewise, torch.device("cpu"))
    assert torch.equal(chooser.choose(logits), logits.argmax(-1))


def test_the_least_temperature_that_samples_is_finite(bytewise: Tokenizer) -> None:
    logits = torch.full((1, bytewise.n_vocab), -1e4)
    logits[0, 7], logits[0, 9] = 1e4, 1e4
    drawn = set()
    for seed in range(20):
        sampling = Sampling(temperature=MIN_TEMPERATURE, seed=seed)
        drawn |= set(Chooser(sampling, [[bytewise.bos_id]], bytewise, torch.device("cpu")).choose(logits).tolist())
    assert drawn == {7, 9}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bytewise: Tokenizer, bad: float, temperature: float) -> None:
    logits = torch.zeros(3, bytewise.n_vocab)
    chooser = Chooser(Sampling(temperature=temperature), [[bytewise.bos_id]] * 3, bytewise, torch.device("cpu"))
    chooser.choose(logits)
    logits[1, 40] = bad
    with pytest.raises(ValueError, match=r"row 1 are NaN or infinite at new token 2"):
        chooser.choose(logits)


def test_an_edit_that_breaks_the_model_is_an_error(tmp_path: Path) -> None:
    """A hook that writes NaN, through the whole loop; before, it ended in a token."""
    tiny_llama(tmp_path)
    model, tokenizer = load_model(tmp_path), load_tokenizer(tmp_path)

    def broken(positions: torch.Tensor) -> Any:
        return {"layers.1.resid_post": lambda x: x * float("nan")}

    with pytest.raises(ValueError, match="NaN or infinite"):
        list(generate(model, tokenizer, [tokenizer.encode_prompt("hello")], GREEDY, broken))


def test_repetition_penalty_leaves_special_tokens_alone(bytewise: Tokenizer) -> None:
    """The end of a turn stands in every chat prompt; a penalty on it would keep answers from ending."""
    end = bytewise.special_tokens["<|eot_id|>"]
    sampling = Sampling(temperature=0, repetition_penalty=1.5)
    chooser = Chooser(sampling, [[bytewise.bos_id, end, 65]], bytewise, torch.device("cpu"))
    logits = torch.zeros(1, bytewise.n_vocab)
    logits[0, end], logits[0, 65], logits[0, 66] = 3.0, 4.0, 2.9
    assert [int(chooser.choose(logits)) for _ in range(3)] == [end] * 3
    assert int(Chooser(sampling, [[end]], bytewise, torch.device("cpu")).choose(logits)) == 65


def test_further_end_tokens_end_a_row(bytewise: Tokenizer) -> None:
    """As a chat template's end of a turn may be another token than the end of a text."""
    (row,) = written(bytewise, [[97, 98, 99, 98]], stop_ids=frozenset({99}))
    assert [(piece.text, piece.finished) for piece in row] == [("a", ""), ("b", ""), ("", "stop")]

"""SmolLM2's tokenizer and chat template out of its GGUF file, against transformers (`make test-real`)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3 import Tokenizer, encode_dialog, load_model, load_tokenizer
from llama3.chat import turn_ends
from tests.test_chat_template import BITS, made_dialogues, theirs
from tests.test_tokenizer import QUIET, STRINGS
from tests.test_tokenizer_holes import HOLED

pytestmark = pytest.mark.real

NUMBERED = "To bake bread:\n\n1. Mix the flour and water.\n\n2. Add salt and yeast.\n\n3. Knead it.\n\n4. Bake until golden.\n"


@pytest.fixture(scope="module")
def ours(smollm2_file: Path) -> Tokenizer:
    return load_tokenizer(smollm2_file)


@pytest.fixture(scope="module")
def as_read(smollm2_file: Path) -> Any:
    """transformers' reading of the file, which does not know the pre-tokenizer `smollm` and cuts as GPT-2 does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2_file.parent), gguf_file=smollm2_file.name)


@pytest.fixture(scope="module")
def oracle(as_read: Any) -> Any:
    """The same with digits set apart first, as the model was trained."""
    from tokenizers import pre_tokenizers

    made = type(as_read)(tokenizer_object=type(as_read.backend_tokenizer).from_str(as_read.backend_tokenizer.to_str()))
    digits_first = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits_first)
    made.chat_template = as_read.chat_template
    return made


def test_10_000_made_strings(ours: Tokenizer, oracle: Any) -> None:
    """Many of them with bytes that have no token."""
    texts = st.lists(st.one_of(STRINGS, st.sampled_from(HOLED)), max_size=6).map("".join)

    @settings(QUIET, max_examples=500)
    @given(st.lists(texts, min_size=20, max_size=20))
    def compare(made: list[str]) -> None:
        expected = oracle(made, add_special_tokens=False)["input_ids"]
        assert [ours.encode(text, allow_special=True) for text in made] == expected

    compare()


def test_the_model_says_that_digits_stand_alone(smollm2_file: Path, ours: Tokenizer, as_read: Any) -> None:
    """The same text is more likely to it than as transformers cuts it, by 10 nats."""
    model = load_model(smollm2_file)

    def loss(ids: list[int]) -> float:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="sum"))

    cut_by_gpt2 = as_read(NUMBERED, add_special_tokens=False)["input_ids"]
    assert cut_by_gpt2 != ours.encode(NUMBERED)
    assert loss(ours.encode(NUMBERED)) < loss(cut_by_gpt2) - 10


@pytest.mark.smoke
def test_200_dialogues(ours: Tokenizer, oracle: Any) -> None:
    for messages in made_dialogues(200, [*BITS, *HOLED], tools=False):
        assert encode_dialog(ours, messages) == theirs(oracle, messages)


def test_what_the_file_says_beside(ours: Tokenizer) -> None:
    assert (ours.n_vocab, ours.eos_id, ours.bos_policy, ours.start()) == (49_152, 2, "none", [])
    assert turn_ends(ours) == ours.stop_ids == {ours.special_tokens["<|im_end|>"]}

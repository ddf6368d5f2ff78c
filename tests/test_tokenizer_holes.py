"""Vocabularies that have no token for some bytes, as SmolLM2's has none for 21: dropped, as Hugging Face drops them."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Trainee

from llama3 import Tokenizer, load_tokenizer
from llama3.tokenizer_json import byte_characters
from tests.test_tokenizer import QUIET, STRINGS, TEXTS, save, trained

MISSING = (0x04, 0x13, 0x1D, 0xC0, 0xF1, 0xF5, 0xFF)
"""Bytes in no merge of the tokenizers trained here."""
HOLED = ["\x04", "\x13", "a\x04b", "t\x1dhe", " \x04the", "'\x13ll", "\U00040000", "\U0007ffff x", "\x04\U00050000\x13"]
LATER = "\U000191c3\U00016ea0\u088f"
"""Letters and digits of a later Unicode than tiktoken's."""


def with_holes(kind: str) -> Trainee:
    """`trained`, its tokens for MISSING taken out."""
    data = json.loads(trained(kind).to_str())
    lost = {character for character, byte in byte_characters().items() if byte in MISSING}
    assert not any(set("".join(merge)) & lost for merge in data["model"]["merges"])
    data["model"]["vocab"] = {token: i for token, i in data["model"]["vocab"].items() if not set(token) & lost}
    return Trainee.from_str(json.dumps(data))


@pytest.fixture(scope="module", params=["llama", "gpt2", "smollm", "words"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Trainee]:
    theirs = with_holes(request.param)
    return load_tokenizer(save(tmp_path_factory.mktemp("tokenizer"), theirs).parent), theirs


def test_bytes_without_a_token_are_dropped(pair: tuple[Tokenizer, Trainee]) -> None:
    ours, theirs = pair
    for text in [*HOLED, *(f"{a}{b}" for a in HOLED for b in TEXTS), *(f"\x04.{c}'ll" for c in LATER)]:
        assert ours.encode(text) == theirs.encode(text).ids, text
    assert ours.encode("\x04") == []
    assert ours.decode(ours.encode("one\x04two")) == "onetwo"


@QUIET
@given(st.lists(st.lists(st.one_of(STRINGS, st.sampled_from(HOLED)), max_size=6).map("".join), min_size=20, max_size=20))
def test_ids_are_those_of_hugging_face(pair: tuple[Tokenizer, Trainee], texts: list[str]) -> None:
    ours, theirs = pair
    expected = [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert [ours.encode(text, allow_special=True) for text in texts] == expected


def test_one_warning_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = load_tokenizer(save(tmp_path, with_holes("gpt2")).parent)
    with caplog.at_level(logging.WARNING):
        ours.encode("nothing is lost here")
        assert not caplog.records
        for _ in range(3):
            ours.encode("a\x04b")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0x04" in caplog.text


def test_a_tokenizer_model_must_have_all_bytes(tmp_path: Path) -> None:
    """A Llama 3 vocabulary has them: a file without is damaged."""
    (tmp_path / "tokenizer.model").write_text("YQ== 0\n")
    with pytest.raises(ValueError, match="no token for some single bytes"):
        load_tokenizer(tmp_path)

"""Tokenizers out of GGUF metadata: the ids of Hugging Face, BOS, chat template, and metadata that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama3 import Tokenizer, encode_dialog, load_tokenizer
from llama3.chat_format import Message
from llama3.gguf_tokenizer import BOS_BY_DEFAULT, PATTERNS, tokenizer_from_gguf
from tests.chat_models import CHATML
from tests.gguf_files import INT32, Stored, Typed, write
from tests.test_tokenizer import QUIET, REAL, STRINGS, TEXTS, Trainee, needs_real, save, trained
from tests.test_tokenizer_holes import HOLED, with_holes

KINDS = {"llama": "llama-bpe", "gpt2": "gpt-2", "smollm": "smollm"}


def metadata_of(made: Trainee, pre: str, /, **changes: Any) -> dict[str, Any]:
    """What llama.cpp's converter would write of a tokenizer; None in `changes` leaves a key out."""
    data = json.loads(made.to_str())
    added = {token["id"]: token for token in data["added_tokens"]}
    by_id = {index: token for token, index in data["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    size = max(by_id) + 1
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = [5 if i not in by_id else 1 if i not in added else 3 if added[i]["special"] else 4 for i in range(size)]
    found: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in data["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }
    found |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}


def save_gguf(path: Path, metadata: dict[str, Any], rows: int = 0) -> Path:
    """The metadata as a file; with `rows`, an embedding of so many."""
    kinds = Typed(INT32, metadata["tokenizer.ggml.token_type"])
    tensors = [Stored("token_embd.weight", (rows, 8), 0, bytes(32 * rows))] if rows else []
    return write(path, list((metadata | {"tokenizer.ggml.token_type": kinds}).items()), tensors)


@pytest.fixture(scope="module", params=list(KINDS))
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Trainee, Any]:
    """Ours, what it was trained as, and transformers' reading of the same file."""
    made = with_holes(request.param)
    path = save_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", metadata_of(made, KINDS[request.param]))
    return load_tokenizer(path), made, AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def test_known_texts(trio: tuple[Tokenizer, Trainee, Any]) -> None:
    ours, made, _ = trio
    for text in [*TEXTS, *HOLED, "  1", "\n\n12 34"]:
        assert ours.encode(text) == made.encode(text).ids, text


@QUIET
@given(st.lists(st.lists(st.one_of(STRINGS, st.sampled_from(HOLED)), max_size=6).map("".join), min_size=20, max_size=20))
def test_ids_are_those_of_hugging_face(trio: tuple[Tokenizer, Trainee, Any], texts: list[str]) -> None:
    """transformers does not know the pre-tokenizer `smollm` and cuts as GPT-2 does, which joins spaces and digits otherwise
    than the tokenizer that was converted. With digits set apart first, as llama.cpp has it too, the ids are the same."""
    ours, made, theirs = trio
    expected = [encoding.ids for encoding in made.encode_batch(texts)]
    assert [ours.encode(text, allow_special=True) for text in texts] == expected
    if '"Digits"' in made.to_str():
        theirs.backend_tokenizer.pre_tokenizer = made.pre_tokenizer
    assert theirs(texts, add_special_tokens=False)["input_ids"] == expected


def test_what_the_file_says_beside(trio: tuple[Tokenizer, Trainee, Any]) -> None:
    ours, _, theirs = trio
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (1, 2, {2})
    assert ours.rules.template_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    asked = [{"role": "user", "content": "hello there"}]
    expected = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_dialog(ours, [Message("user", "hello there")]) == list(expected)


@pytest.mark.parametrize("pre", PATTERNS)
@pytest.mark.parametrize("said", [True, False, None])
def test_bos(pre: str, said: bool | None) -> None:
    """As llama.cpp has it: by the flag, else as models of that pre-tokenizer were trained."""
    metadata = metadata_of(trained("gpt2"), pre, add_bos_token=said)
    expected = said if said is not None else pre in BOS_BY_DEFAULT
    assert bool(tokenizer_from_gguf(metadata).start()) is expected


def test_added_and_unused_tokens() -> None:
    made = Trainee.from_str(trained("gpt2").to_str())
    made.add_tokens(["<tool>"])
    metadata = metadata_of(made, "gpt-2", eot_token_id=0)
    metadata["tokenizer.ggml.tokens"].append("[PAD]")
    metadata["tokenizer.ggml.token_type"].append(5)
    ours = tokenizer_from_gguf(metadata)
    for text in ("a<tool>b", "<tool><tool> x", "[PAD]"):
        assert ours.encode(text) == made.encode(text).ids
    assert ours.stop_ids == {0, 2}
    assert not ours.is_special(ours.special_tokens["<tool>"])


def test_it_is_the_tokenizer_of_the_other_layout(tmp_path: Path) -> None:
    """The same hash, so that an SAE fits whichever file the model came in."""
    for kind, pre in KINDS.items():
        other = load_tokenizer(save(tmp_path, trained(kind), bos_token="<|im_start|>").parent)
        assert tokenizer_from_gguf(metadata_of(trained(kind), pre)).hash == other.hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "'llama' .SentencePiece.; expected 'gpt2'"),
        ({"model": "bert"}, "WordPiece"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre is 'unheard-of'"),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"pre": ["x"]}, "tokenizer.ggml.pre is"),
        ({"tokens": None}, "tokenizer.ggml.tokens: expected a list of strings"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens: expected a list of strings"),
        ({"tokens": ["a", "a"]}, "holds a token twice"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: expected 900 numbers, found 1 entries"),
        ({"token_type": None}, "tokenizer.ggml.token_type"),
        ({"token_type": ["x"] * 900}, "tokenizer.ggml.token_type"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"merges": ["q q"]}, "a merge makes 'qq'|come from no merge"),
        ({"bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id is 1000000; expected 0 to 899"),
        ({"eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is 'x'"),
        ({"bos_token_id": None}, "no special token '<|begin_of_text|>'"),
    ],
)
def test_wrong_metadata_is_named(changes: dict[str, Any], message: str) -> None:
    metadata = metadata_of(trained("gpt2"), "gpt-2", **changes)
    with pytest.raises(ValueError, match=message.replace("|", r"\|") if "begin" in message else message) as failed:
        tokenizer_from_gguf(metadata, "model.gguf")
    assert "\n" not in str(failed.value)


def test_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    metadata = metadata_of(trained("gpt2"), "gpt-2")
    assert load_tokenizer(save_gguf(tmp_path / "right.gguf", metadata, rows=900)).n_vocab == 900
    with pytest.raises(ValueError, match="900 tokens, its embedding 899 rows"):
        load_tokenizer(save_gguf(tmp_path / "wrong.gguf", metadata, rows=899))


@needs_real
def test_llama_3_out_of_a_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real vocabulary as llama.cpp stores it: the tokenizer of Meta's file, hash and all."""
    from tests.test_tokenizer import convert

    meta = Tokenizer.from_file(REAL)
    made = convert(REAL, monkeypatch)
    metadata = metadata_of(made, "llama-bpe", bos_token_id=128_000, eos_token_id=128_009, unknown_token_id=None)
    found = tokenizer_from_gguf(metadata | {"tokenizer.chat_template": ""})
    assert (found.hash, found.start(), found.bos_id) == (meta.hash, [128_000], 128_000)
    assert found.stop_ids == meta.stop_ids

"""BOS as the model was trained: one decision, read from the checkpoint, followed by every stage and recorded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from capture.store import open_activations
from core.artifact import verify
from inference.row import new_row
from inference.session import Feature, Features, Session
from inference.web.workbench import heat
from interpretability.search import search_prompts
from llama3 import load_model, load_tokenizer
from llama3.generate import Sampling, complete
from sae.model import SAE, SAEConfig
from tests.test_capture import SITES, capture, write_corpus
from tests.test_tokenizer import Trainee, save, trained
from tests.tiny import tiny_llama, tiny_tokenizer

BOS = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
EOS = processors.TemplateProcessing("$A <|im_end|>", None, [("<|im_end|>", 2)])
LAST = processors.ByteLevel(trim_offsets=False)


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        (None, {}, False),
        (LAST, {}, False),
        (BOS, {}, True),
        (EOS, {}, False),
        (processors.Sequence([LAST, BOS]), {}, True),
        (None, {"add_bos_token": False}, False),
        (None, {"add_bos_token": None}, False),
        (BOS, {"add_bos_token": False}, True),
        (EOS, {"add_bos_token": True}, False),
    ],
)
def test_read_as_transformers_reads_it(tmp_path: Path, processor: Any, settings: dict[str, Any], expected: bool) -> None:
    from transformers import AutoTokenizer

    made = Trainee.from_str(trained("smollm").to_str())
    if processor is not None:
        made.post_processor = processor
    save(tmp_path, made, eos_token="<|im_end|>", **settings, tokenizer_class="PreTrainedTokenizerFast")
    found = load_tokenizer(tmp_path)
    assert found.rules.add_bos is expected
    assert found.bos_policy == ("feed" if expected else "none")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))("hello").input_ids
    assert (theirs[0] == found.bos_id) is expected
    assert found.encode_prompt("hello") == [found.bos_id] * expected + found.encode("hello")


def test_add_bos_token_counts_where_no_template_is(tmp_path: Path) -> None:
    save(tmp_path, trained("smollm"), add_bos_token=True)
    assert load_tokenizer(tmp_path).start() == [0]


def test_llama_3_has_bos_by_convention(tmp_path: Path) -> None:
    """In Meta's layout nothing says so, and the first tokenizer.json of Llama 3 did not either."""
    tiny_tokenizer(tmp_path)
    found = load_tokenizer(tmp_path)
    assert found.start() == [found.bos_id]
    assert (found.start("none"), found.start("feed")) == ([], [found.bos_id])
    made = Trainee.from_str(trained("llama").to_str())
    made.add_special_tokens(["<|begin_of_text|>"])
    (tmp_path / "hf").mkdir()
    save(tmp_path / "hf", made, bos_token="<|begin_of_text|>")
    assert load_tokenizer(tmp_path / "hf").start() != []


@pytest.mark.parametrize("broken", ["x", {"processors": 3}, {"type": "TemplateProcessing"}, {"processors": [1]}])
def test_a_broken_post_processor_is_named(tmp_path: Path, broken: Any) -> None:
    file = save(tmp_path, trained("smollm"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": broken}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: its post_processor"):
        load_tokenizer(tmp_path)


def test_it_is_no_part_of_the_hash(tmp_path: Path) -> None:
    """The ids of a text do not depend on it: SAEs of earlier versions still fit."""
    save(tmp_path, trained("smollm"))
    before = load_tokenizer(tmp_path)
    save(tmp_path, trained("smollm"), add_bos_token=True)
    after = load_tokenizer(tmp_path)
    assert (before.start(), after.start()) == ([], [after.bos_id])
    assert before.hash == after.hash


# --- what follows it ---------------------------------------------------------------------------------------------------------


def without_bos(folder: Path) -> Path:
    """A random Llama whose tokenizer says that it was trained without BOS."""
    tokenizer = save(folder, trained("smollm"))
    vocab_size = load_tokenizer(tokenizer.parent).n_vocab
    tiny_llama(folder, vocab_size=vocab_size)
    (folder / "tokenizer.model").unlink()
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    (tmp_path / "bare").mkdir()
    return without_bos(tmp_path / "bare")


def test_capture_follows_and_records_it(tmp_path: Path, bare: Path) -> None:
    corpus = write_corpus(tmp_path, 4)
    with_bos = tiny_llama(tmp_path / "llama3")
    for model, expected in ((bare, "none"), (with_bos, "feed")):
        for flag in ("auto", expected):
            capture(model, corpus, tmp_path / f"{model.name}-{flag}", bos=flag)
        auto, said = (verify(tmp_path / f"{model.name}-{flag}") for flag in ("auto", expected))
        assert auto.to_json() == said.to_json()
        assert auto.provenance["bos"] == auto.config["bos"] == expected
    assert open_activations(tmp_path / "bare-auto", SITES[0]).n_tokens > 0


def test_completion_and_reading_follow_it(bare: Path) -> None:
    model, tokenizer = load_model(bare), load_tokenizer(bare)
    greedy = Sampling(max_new_tokens=4, temperature=0)
    assert complete(model, tokenizer, ["The sea"], greedy) == complete(model, tokenizer, ["The sea"], greedy, bos="none")
    session = Session(model, tokenizer, "bare")
    row = new_row(session, "The sea was")
    assert list(row.ids) == tokenizer.encode("The sea was")
    assert session.lead == 0
    assert new_row(llama3_session(), "The sea").ids[0] == llama3_session().tokenizer.bos_id


def llama3_session() -> Session:
    return Session(load_model("demo"), load_tokenizer("demo"), "demo")


def fired_everywhere(session: Session, n_latents: int = 4) -> Features:
    """Features whose latents fire at every token."""
    sae = SAE(SAEConfig(d_model=session.model.params.dim, n_latents=n_latents, k=n_latents))
    with torch.no_grad():
        sae.b_enc.fill_(1.0)
        sae.W_enc.zero_()
    top: Any = type("Top", (), {"max_values": [1.0] * n_latents})()
    return Features(sae, "layers.1.resid_post", top, {})


def test_shading_begins_with_the_text(bare: Path) -> None:
    """A value for each token of the text: BOS has none, and what stands at position 0 is not read."""
    session = Session(load_model(bare), load_tokenizer(bare), "bare")
    session = replace(session, features=(fired_everywhere(session),))
    row = new_row(session, "The sea was")
    (values,) = heat(session, [row], Feature("layers.1.resid_post", 0))
    assert len(values) == len(row.ids)
    assert values[0] == 0
    assert all(value > 0 for value in values[1:])


def test_a_prompt_of_one_token_has_nothing_to_read(bare: Path) -> None:
    session = Session(load_model(bare), load_tokenizer(bare), "bare")
    features = fired_everywhere(session)
    with pytest.raises(ValueError, match="one token"):
        search_prompts(features.sae, session.model, session.tokenizer, features.site, features.max_values, ["x"])

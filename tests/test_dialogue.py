"""Long conversations: what fits is found without encoding the history again for every message that is dropped."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import inference.chat
import inference.dialogue
from core.runtime import Runtime, Solo
from inference.app import AppConfig, open_handlers
from inference.chat import ChatConfig
from inference.dialogue import Style, prepare, style_of
from inference.session import Session
from interpretability.llm.client import AskConfig
from interpretability.llm.in_process import InProcess
from llama3 import Transformer, load_tokenizer
from llama3.chat_format import Message
from tests.chat_models import CHATML, PLAIN_LLAMA, chat_tokenizer
from tests.test_tokenizer import save, trained
from tests.tiny import tiny_args, tiny_tokenizer

STYLES: tuple[Style, ...] = ("template", "llama3", "plain")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    tokenizer = load_tokenizer(chat_tokenizer(tmp_path_factory.mktemp("chat"), PLAIN_LLAMA))
    with torch.device("meta"):
        model = Transformer(tiny_args(vocab_size=tokenizer.n_vocab, max_seq_len=600))
    return Session(model, tokenizer, "tiny")


def long_talk(n: int) -> list[Message]:
    """A system prompt and `n` messages, the last from the user; all different, some empty, some long."""
    texts = [f"number {i} " + "word " * (i * i % 23) for i in range(n)]
    said = [Message("user" if (n - i) % 2 else "assistant", text) for i, text in enumerate(texts)]
    return [Message("system", "Be kind."), *said]


def slowly_dropped(session: Session, messages: list[Message], style: Style, room: int) -> int:
    """One message less at a time, the whole encoded anew."""
    system, others = messages[:1], messages[1:]
    for dropped in range(len(others)):
        ids = inference.dialogue.ENCODERS[style](session.tokenizer, [*system, *others[dropped:]])
        opens_well = others[dropped].role == "user" or dropped == len(others) - 1
        if opens_well and len(ids) + min(room, session.context // 2) <= session.context:
            return dropped
    raise AssertionError("the last one fits")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("context", [120, 300, 600])
def test_as_much_as_fits(session: Session, style: Style, n: int, context: int) -> None:
    with torch.device("meta"):
        small = replace(session, model=Transformer(tiny_args(vocab_size=session.tokenizer.n_vocab, max_seq_len=context)))
    messages = long_talk(n)
    turn = prepare(small, messages, style, 40)
    assert turn.dropped == slowly_dropped(small, messages, style, 40)
    kept = [messages[0], *messages[1 + turn.dropped :]]
    assert turn.ids == inference.dialogue.ENCODERS[style](session.tokenizer, kept)
    assert turn.stop == (("\nQuestion:", "\nAnswer:") if style == "plain" else ())


@pytest.mark.parametrize("style", STYLES)
def test_2001_messages_take_no_second(session: Session, style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a history ten times as long encodes no more text: what is tried is never much longer than what fits."""
    encoded = 0
    plain = session.tokenizer.encode

    def counted(text: str, **how: bool) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        return plain(text, **how)

    monkeypatch.setattr(session.tokenizer, "encode", counted)
    seen = []
    for n in (2001, 20_001):
        session.tokenizer.encode_part.cache_clear()
        encoded = 0
        began = time.process_time()
        assert prepare(session, long_talk(n), style, 100).dropped > n - 200
        seen.append((encoded, time.process_time() - began))
    assert seen[0][1] < 1
    assert seen[1][0] < 2 * seen[0][0]


@pytest.mark.parametrize("style", ["template", "llama3"])
def test_each_message_is_encoded_once(session: Session, style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the turns of a conversation too."""
    session.tokenizer.encode_part.cache_clear()
    calls: list[str] = []
    plain = session.tokenizer.encode
    monkeypatch.setattr(session.tokenizer, "encode", lambda text, **how: calls.append(text) or plain(text, **how))
    messages = long_talk(9)
    for n in range(2, 11, 2):
        prepare(session, messages[:n], style, 40)
    assert len(calls) == len(set(calls))


def test_a_style_that_the_model_cannot_follow(tmp_path: Path) -> None:
    bare = load_tokenizer(save(tmp_path, trained("smollm")).parent)
    chatml = load_tokenizer(chat_tokenizer(tmp_path / "chatml", CHATML))
    (tmp_path / "meta").mkdir()
    tiny_tokenizer(tmp_path / "meta")
    meta = load_tokenizer(tmp_path / "meta")
    assert [style_of("auto", "m", tokenizer) for tokenizer in (chatml, meta)] == ["template", "llama3"]
    assert [style_of("plain", "m", tokenizer) for tokenizer in (bare, chatml, meta)] == ["plain"] * 3
    for asked, tokenizer, message in (
        ("auto", bare, "no chat format"),
        ("llama3", chatml, "--style llama3"),
        ("template", meta, "--style template"),
        ("none", meta, "--style 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            style_of(asked, "m", tokenizer)


def test_a_model_without_a_chat_format_is_refused_before_its_weights(tmp_path: Path) -> None:
    """The folder has none, and nobody asks for them."""
    save(tmp_path, trained("smollm"))
    runtime = Runtime(0, 1, torch.device("cpu"), Solo())
    with pytest.raises(ValueError, match="no chat format"):
        inference.chat.run(ChatConfig(model=str(tmp_path)), runtime)
    with pytest.raises(ValueError, match="--style llama3"):
        open_handlers(AppConfig(model=str(tmp_path), style="llama3"), runtime.device)
    with pytest.raises(ValueError, match="no chat format"):
        InProcess(AskConfig(model=str(tmp_path)), runtime.device)
    with pytest.raises(ValueError, match=r"expected a checkpoint|config\.json"):
        open_handlers(AppConfig(model=str(tmp_path)), runtime.device)  # a page opens for completion: the weights are next

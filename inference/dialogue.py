"""Conversations as token ids: the format of the Llama 3 instruct models, or a transcript for models that only continue text."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from inference.session import Session
from llama3.chat_format import Message, encode_dialog
from llama3.tokenizer import Tokenizer

Style = Literal["llama3", "plain"]

MAX_MESSAGE_CHARACTERS = 8_000
SPEAKERS = {"user": "Question", "assistant": "Answer"}
"""Who speaks in a plain transcript."""


class Turn(NamedTuple):
    """A dialogue made ready for the next answer."""

    ids: list[int]
    stop: tuple[str, ...]
    dropped: int
    """Oldest messages left out so that the answer fits into the context."""


def prepare(session: Session, messages: Sequence[Message], style: Style, room: int) -> Turn:
    """Encode `messages` for the assistant's next turn with `room` tokens left for it; the oldest go first, the system prompt
    stays.

    Raises ValueError where the last message alone is too long.
    """
    system = [message for message in messages if message.role == "system"]
    others = [message for message in messages if message.role != "system"]
    assert others
    if len(others[-1].content) > MAX_MESSAGE_CHARACTERS:
        raise ValueError(f"a message may hold {MAX_MESSAGE_CHARACTERS:,} characters; found {len(others[-1].content):,}")
    encode = encode_dialog if style == "llama3" else _encode_plain
    for dropped in range(len(others)):
        kept = others[dropped:]
        if kept[0].role != "user" and len(kept) > 1:
            continue  # a conversation does not open with an answer
        ids = encode(session.tokenizer, [*system, *kept])
        if len(ids) + min(room, session.context // 2) <= session.context:
            stop = () if style == "llama3" else tuple(f"\n{speaker}:" for speaker in SPEAKERS.values())
            return Turn(ids, stop, dropped)
    raise ValueError(
        f"the message with its system prompt has {len(ids):,} tokens; the context holds {session.context:,}, half of it kept "
        "for the answer. Shorten the message"
    )


def _encode_plain(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    lines = [
        message.content.strip() if message.role == "system" else f"{SPEAKERS[message.role]}: {message.content.strip()}"
        for message in messages
    ]
    return tokenizer.encode_prompt("\n".join([*lines, f"{SPEAKERS['assistant']}:"]))


def style_of(asked: str, model: str) -> Style:
    """`auto` is plain for the embedded model, which has learnt to continue text and not to converse, and llama3 for others."""
    if asked == "auto":
        return "plain" if model == "demo" else "llama3"
    if asked == "llama3":
        return "llama3"
    if asked == "plain":
        return "plain"
    raise ValueError(f"--style {asked!r}: expected auto, llama3 or plain")

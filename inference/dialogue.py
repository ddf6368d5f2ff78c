"""Conversations as token ids: in the model's own chat format, or a transcript for models that only continue text."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from inference.session import Session
from llama3.chat import check_chat, turn_ends
from llama3.chat_format import Message, encode_llama3, speaks_llama3
from llama3.chat_template import encode_with_template
from llama3.tokenizer import Tokenizer

Style = Literal["template", "llama3", "plain"]

MAX_MESSAGE_CHARACTERS = 8_000
SPEAKERS = {"user": "Question", "assistant": "Answer"}
"""Who speaks in a plain transcript."""


class Turn(NamedTuple):
    """A dialogue made ready for the next answer."""

    ids: list[int]
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    """Tokens that end the answer beside the tokenizer's own."""
    dropped: int
    """Oldest messages left out so that the answer fits into the context."""


def prepare(session: Session, messages: Sequence[Message], style: Style, room: int) -> Turn:
    """Encode `messages` for the assistant's next turn with `room` tokens left for it; the oldest go first, the system prompt
    stays.

    Raises ValueError where the last message alone is too long.
    """
    tokenizer, space = session.tokenizer, session.context - min(room, session.context // 2)
    system = [message for message in messages if message.role == "system"]
    others = [message for message in messages if message.role != "system"]
    assert others
    if len(others[-1].content) > MAX_MESSAGE_CHARACTERS:
        raise ValueError(f"a message may hold {MAX_MESSAGE_CHARACTERS:,} characters; found {len(others[-1].content):,}")

    def encoded(dropped: int) -> list[int]:
        return ENCODERS[style](tokenizer, [*system, *others[dropped:]])

    last = encoded(len(others) - 1)
    if len(last) > space:
        raise ValueError(
            f"the message with its system prompt has {len(last):,} tokens; the context holds {session.context:,}, half of it "
            "kept for the answer. Shorten the message"
        )
    # A conversation does not open with an answer.
    starts = [i for i, message in enumerate(others) if message.role == "user" or i == len(others) - 1]
    dropped = _first_that_fits(starts, lambda start: len(encoded(start)) <= space)
    stop = tuple(f"\n{speaker}:" for speaker in SPEAKERS.values()) if style == "plain" else ()
    return Turn(encoded(dropped), stop, turn_ends(tokenizer) if style == "template" else frozenset(), dropped)


def _first_that_fits(starts: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The first of `starts` from which on all fit, as the last is known to. From the end in growing steps: what is tried is
    never much longer than what fits, however long the history."""
    found, step = len(starts) - 1, 1
    while found and fits(starts[max(0, found - step)]):
        found, step = max(0, found - step), 2 * step
    return starts[bisect_left(starts, True, lo=max(0, found - step), hi=found, key=fits)]


def _encode_plain(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    lines = [
        message.content.strip() if message.role == "system" else f"{SPEAKERS[message.role]}: {message.content.strip()}"
        for message in messages
    ]
    return tokenizer.encode_prompt("\n".join([*lines, f"{SPEAKERS['assistant']}:"]))


ENCODERS: dict[Style, Callable[[Tokenizer, Sequence[Message]], list[int]]] = {
    "template": encode_with_template,
    "llama3": encode_llama3,
    "plain": _encode_plain,
}


def check_style(asked: str) -> None:
    """ValueError for a --style that does not exist."""
    if asked not in ("auto", *ENCODERS):
        raise ValueError(f"--style {asked!r}: expected auto, {', '.join(ENCODERS)}")


def style_of(asked: str, model: str, tokenizer: Tokenizer) -> Style:
    """The style that `asked` names. `auto` is plain for the embedded model, which has learnt to continue text and not to
    converse, and for others the template that the checkpoint brings, else Llama 3's format.

    ValueError where the model cannot follow it.
    """
    check_style(asked)
    if asked == "plain" or (asked == "auto" and model == "demo"):
        return "plain"
    if asked == "llama3" and not speaks_llama3(tokenizer):
        raise ValueError("--style llama3: this model's tokenizer has no <|start_header_id|>; give --style auto or plain")
    if asked == "template" and not tokenizer.rules.chat_template:
        raise ValueError("--style template: this model's checkpoint brings no chat template; give --style auto or plain")
    check_chat(tokenizer)
    return "template" if asked != "llama3" and tokenizer.rules.chat_template else "llama3"

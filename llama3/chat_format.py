"""The chat format of the Llama 3 instruct models: a header per message, `<|eot_id|>` after it.

Written from the model card's prompt format; the known ids are in tests/test_tokenizer.py.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from llama3.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "ipython"]
ROLES = ("system", "user", "assistant", "ipython")


class Message(NamedTuple):
    """One turn. `ipython` carries what a tool returned; an assistant turn that calls a tool ends with `<|eom_id|>`."""

    role: Role
    content: str
    calls_tool: bool = False


def check_role(role: str) -> None:
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}: expected one of {', '.join(ROLES)}")


def speaks_llama3(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the tokens of this format."""
    return all(name in tokenizer.special_tokens for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))


def encode_header(tokenizer: Tokenizer, role: str) -> list[int]:
    """`<|start_header_id|>role<|end_header_id|>` and a blank line."""
    check_role(role)
    start, end = _special(tokenizer, "<|start_header_id|>"), _special(tokenizer, "<|end_header_id|>")
    return [start, *tokenizer.encode_part(role), end, *tokenizer.encode_part("\n\n")]


def encode_message(tokenizer: Tokenizer, message: Message) -> list[int]:
    """One message with its header and its end token. Special tokens spelled in the content stay plain text."""
    end = "<|eom_id|>" if message.calls_tool else "<|eot_id|>"
    call = [_special(tokenizer, "<|python_tag|>")] if message.calls_tool else []
    content = tokenizer.encode_part(message.content.strip())
    return [*encode_header(tokenizer, message.role), *call, *content, _special(tokenizer, end)]


def encode_llama3(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The whole dialogue, from `<|begin_of_text|>` to the open header of the assistant's next turn."""
    ids = [tokenizer.bos_id]
    for message in messages:
        ids += encode_message(tokenizer, message)
    return ids + encode_header(tokenizer, "assistant")


def _special(tokenizer: Tokenizer, name: str) -> int:
    if name not in tokenizer.special_tokens:
        raise ValueError(f"this model's tokenizer has no {name}: it knows no Llama 3 chat format; use plain completion")
    return tokenizer.special_tokens[name]

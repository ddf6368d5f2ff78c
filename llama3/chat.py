"""Which chat format a model has: its own template, else that of Llama 3."""

from collections.abc import Sequence

from llama3.chat_format import Message, encode_llama3, speaks_llama3
from llama3.chat_template import encode_with_template, end_of_turn
from llama3.tokenizer import Tokenizer


def has_chat(tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.rules.chat_template) or speaks_llama3(tokenizer)


def check_chat(tokenizer: Tokenizer) -> None:
    """ValueError for a model that has no chat format."""
    if not has_chat(tokenizer):
        raise ValueError(
            "this model has no chat format: its checkpoint brings no chat template, and its tokenizer has not Llama 3's "
            "<|start_header_id|>, <|end_header_id|> and <|eot_id|>; take an instruct model, or plain completion"
        )


def encode_dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The whole dialogue, to the open header of the assistant's next turn, by the model's template or in Llama 3's format."""
    check_chat(tokenizer)
    encode = encode_with_template if tokenizer.rules.chat_template else encode_llama3
    return encode(tokenizer, messages)


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end the assistant's turn beside `Tokenizer.stop_ids`."""
    return end_of_turn(tokenizer) if tokenizer.rules.chat_template else frozenset()

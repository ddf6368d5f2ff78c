"""Dialogues in a model's own format: the Jinja template that its checkpoint brings.

What a message says never becomes a special token. Before rendering, the first character of every special token that a content
spells is replaced by a private character, which is put back once the text has been split at the template's own tokens: lengths
stay, and filters such as `trim` see what they would see. A template might still assemble one from what a content says, by
cutting out a part of it; so where a content holds a character that begins a special token, the template is rendered a second
time with all of those replaced, and that text is taken if its special tokens are others.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from llama3.chat_format import Message, check_role
from llama3.rendering import render
from llama3.tokenizer import Tokenizer

PRIVATE = range(0xE000, 0xF900)
"""Unicode's private characters, of which none means anything."""


def encode_with_template(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue, to the open header of the assistant's next turn. ValueError where the template fails or refuses
    the dialogue (`rendering`)."""
    text, stand_ins = _safely_rendered(tokenizer, messages)
    back = {ord(stand_in): character for character, stand_in in stand_ins.items()}
    ids: list[int] = []
    for i, part in enumerate(tokenizer.split_special(text)):
        ids += [tokenizer.special_tokens[part]] if i % 2 else tokenizer.encode_part(part.translate(back))
    return ids


@lru_cache(maxsize=4)
def end_of_turn(tokenizer: Tokenizer) -> frozenset[int]:
    """The special token with which the template ends the assistant's turn; none where it ends it otherwise."""
    private = _private("", tokenizer)
    mark = next(private)
    dialogue = [Message("user", next(private)), Message("assistant", mark)]
    try:
        text = render(tokenizer.rules.chat_template, _variables(tokenizer, dialogue, {}, False))
    except ValueError:  # a template that wants another dialogue; the tokenizer's own end tokens remain
        return frozenset()
    after = tokenizer.split_special(text.rpartition(mark)[2])
    return frozenset(tokenizer.special_tokens[token] for token in after[1:2])


def _safely_rendered(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, dict[str, str]]:
    """The dialogue as text, and the private character that stands in it for each first character of a special token."""
    for message in messages:
        check_role(message.role)
        if message.calls_tool:
            raise ValueError("a message that calls a tool can be encoded in Llama 3's own format alone, not by a template")
    contents = "".join(message.content for message in messages)
    names = [name for name in tokenizer.special_tokens if name not in tokenizer.rules.always]
    first = sorted({name[0] for name in names})
    stand_ins = dict(zip(first, _private(contents, tokenizer), strict=False))
    template = tokenizer.rules.chat_template
    spelled = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    text = render(template, _variables(tokenizer, messages, stand_ins, True, spelled))
    if any(character in contents for character in first):
        strict = render(
            template, _variables(tokenizer, messages, stand_ins, True, re.compile("[" + re.escape("".join(first)) + "]"))
        )
        if _specials(tokenizer, text) != _specials(tokenizer, strict):
            text = strict
    return text, stand_ins


def _variables(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    stand_ins: Mapping[str, str],
    prompt: bool,
    found: "re.Pattern[str] | None" = None,
) -> dict[str, Any]:
    """What a template sees, as in transformers; in contents, what `found` finds begins with its stand-in."""

    def marked(content: str) -> str:
        return content if found is None else found.sub(lambda match: stand_ins[match[0][0]] + match[0][1:], content)

    return {
        "messages": [{"role": message.role, "content": marked(message.content)} for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": prompt,
        **tokenizer.rules.template_tokens,
    }


def _private(contents: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Private characters that neither the contents nor the template hold."""
    used = set(contents) | set(tokenizer.rules.chat_template)
    return (chr(code) for code in PRIVATE if chr(code) not in used)


def _specials(tokenizer: Tokenizer, text: str) -> list[str]:
    return [token for token in tokenizer.split_special(text)[1::2] if token not in tokenizer.rules.always]

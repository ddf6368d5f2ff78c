"""Read Hugging Face's `tokenizer.json` where it describes byte-level BPE, the kind that tiktoken can run."""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from core.text import read_json, read_text
from llama3.tokenizer import SPLIT_PATTERN, TextRules

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What a ByteLevel step with `use_regex` cuts by; from OpenAI's gpt-2, `encoder.py`."""
COMPLETE = (SPLIT_PATTERN, GPT2_PATTERN)
"""Patterns known to match every character."""
MAX_TEMPLATE = 1_000_000  # bytes
TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Names of special tokens in chat templates, as in transformers."""


def read_tokenizer_json(path: Path) -> tuple[dict[bytes, int], dict[str, int], TextRules]:
    """Ranks, special tokens and rules of a `tokenizer.json`, for `Tokenizer`.

    The names of its first and last tokens, and the chat template, come from `tokenizer_config.json` beside it (the template
    from `chat_template.jinja` where there is one), further end tokens from `generation_config.json`. ValueError, naming the
    part, for everything that is not byte-level BPE as tiktoken runs it.
    """
    data = read_json(path)
    added = {str(token["content"]): token for token in data.get("added_tokens") or []}
    settings = _optional(path.with_name("tokenizer_config.json"))
    pre_split, pattern = split_rules(path, _patterns(path, data))
    ranks = read_ranks(path, data.get("model") or {}, set(added))
    always = frozenset(name for name, token in added.items() if not token.get("special"))
    for name in always:
        if any(added[name].get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise ValueError(f"{path}: added token {name!r} strips or needs spaces around it, which is not supported")
    specials = {name: int(token["id"]) for name, token in added.items()}
    bos, eos = _first_and_last(path, settings, specials)
    rules = TextRules(
        pattern,
        pre_split,
        always,
        bos,
        eos,
        TextRules().stops | _stops(path.parent, specials),
        _adds_bos(path, settings, data, bos),
        _chat_template(path, settings),
        {name: token for name in TEMPLATE_TOKENS if (token := _content(settings.get(name)))}
        | {"bos_token": bos, "eos_token": eos},
    )
    return ranks, specials, rules


def _patterns(path: Path, data: dict[str, Any]) -> list[str]:
    """The patterns that cut text before BPE."""
    if data.get("normalizer"):
        raise ValueError(f"{path}: normalizer {data['normalizer'].get('type')!r} is not supported; expected none")
    step = data.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    patterns: list[str] = []
    for i, step in enumerate(steps):
        kind = step.get("type")
        last = i == len(steps) - 1
        if kind == "ByteLevel" and last and not step.get("add_prefix_space"):
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
        elif kind == "Split" and not last and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex") or re.escape(step["pattern"]["String"]))
        elif kind == "Digits" and not last:
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        else:
            raise ValueError(
                f"{path}: pre-tokenizer {kind!r} is not supported here; expected Split (isolated) or Digits, then ByteLevel "
                "without added space (byte-level BPE, as Llama 3 has it)"
            )
    return patterns


def split_rules(path: Path | str, patterns: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """`patterns`, applied one after the other, as `TextRules.pre_split` and the pattern that tiktoken is to apply itself."""
    if vague := [pattern for pattern in patterns if re.search(r"\\[wWbBdD]|\[\[:", pattern)]:
        raise ValueError(
            f"{path}: pattern {vague[0]!r} uses classes on which regex engines differ; expected \\p{{...}} and \\s"
        )
    # Text that tiktoken's pattern does not match would be lost, so it only gets patterns known to match everything.
    if patterns and patterns[-1] in COMPLETE:
        return tuple(patterns[:-1]), patterns[-1]
    return tuple(patterns), r"(?s:.+)"


def read_ranks(path: Path | str, model: Mapping[str, Any], added: AbstractSet[str]) -> dict[bytes, int]:
    """Bytes of each token and its id, which tiktoken takes as the order of merges. `model` is that of a `tokenizer.json`;
    tokens in `added` are left out."""
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte fallback (SentencePiece)" if model.get("byte_fallback") else model.get("type")
        raise ValueError(f"{path}: is {kind}; expected byte-level BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{path}: {key} = {model[key]!r} is not supported; expected none")
    to_byte = byte_characters()
    vocabulary = {token: int(index) for token, index in model.get("vocab", {}).items() if token not in added}
    try:
        ranks = {bytes(to_byte[c] for c in token): index for token, index in vocabulary.items()}
    except KeyError as error:
        raise ValueError(f"{path}: a token holds {error.args[0]!r}; expected byte-level BPE, whose tokens are bytes") from None
    n_bytes = sum(len(token) == 1 for token in ranks)
    merged = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges", [])]
    if unknown := [token for token in merged if token not in vocabulary]:
        raise ValueError(f"{path}: a merge makes {unknown[0]!r}, which is not in the vocabulary")
    order = [vocabulary[token] for token in merged]
    if order != sorted(order):
        raise ValueError(f"{path}: its merges are not in the order of their ids, which tiktoken needs")
    if not model.get("ignore_merges") and len(set(merged)) + n_bytes < len(ranks):
        raise ValueError(
            f"{path}: {len(ranks) - n_bytes - len(set(merged))} token(s) come from no merge, which is not supported"
        )
    return ranks


def byte_characters() -> dict[str, int]:
    """The byte that each printable character of a byte-level BPE file stands for, as in GPT-2's `bytes_to_unicode`."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(other)}


def _first_and_last(path: Path, settings: dict[str, Any], specials: dict[str, int]) -> tuple[str, str]:
    """Names of the tokens that begin and end a text: by `tokenizer_config.json`, else by `config.json`, else Llama's own."""
    config = _optional(path.with_name("config.json"))
    names = {index: name for name, index in specials.items()}
    found = []
    for key, llama in (("bos_token", "<|begin_of_text|>"), ("eos_token", "<|end_of_text|>")):
        token, token_id = _content(settings.get(key)), config.get(f"{key}_id")
        if isinstance(token_id, list):
            token_id = token_id[0] if token_id else None
        name = token or names.get(-1 if token_id is None else token_id, llama)
        if name not in specials:
            raise ValueError(f"{path}: its {key} {name!r} is not among its added tokens")
        found.append(name)
    return found[0], found[1]


def _content(token: Any) -> str:
    """The text of a token that is a string or an object with its `content`; empty for neither."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _adds_bos(path: Path, settings: dict[str, Any], data: dict[str, Any], bos: str) -> bool:
    """By the post-processor's template, which transformers 5 follows alone, else by `add_bos_token`, else as Llama 3 has it,
    whose first files had neither."""
    step = data.get("post_processor") or {}
    try:
        for template in [step, *step.get("processors", [])]:
            if template.get("type") == "TemplateProcessing":
                return bool(template["single"][0].get("SpecialToken", {}).get("id") == bos)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError(f"{path}: its post_processor is not one of Hugging Face's") from None
    said = settings.get("add_bos_token")
    return said if isinstance(said, bool) else bos == TextRules().bos


def _chat_template(path: Path, settings: dict[str, Any]) -> str:
    """That of `chat_template.jinja`, else of `tokenizer_config.json`, where a list has one called default."""
    file = path.with_name("chat_template.jinja")
    if file.is_file():
        if file.stat().st_size > MAX_TEMPLATE:
            raise ValueError(f"{file}: has {file.stat().st_size:,} bytes; a chat template has {MAX_TEMPLATE:,} at most")
        return read_text(file)
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    return found if isinstance(found, str) else ""


def _stops(folder: Path, specials: dict[str, int]) -> frozenset[str]:
    ids = _optional(folder / "generation_config.json").get("eos_token_id")
    wanted = set(ids) if isinstance(ids, list) else {ids}
    return frozenset(name for name, index in specials.items() if index in wanted)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}

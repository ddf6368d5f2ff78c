"""The tokenizer that a GGUF file's metadata describes, where that is byte-level BPE.

Names and meanings of the keys, and which models cut text in which way, are those of llama.cpp (`src/llama-vocab.cpp`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama3.tokenizer import SPLIT_PATTERN, TextRules, Tokenizer
from llama3.tokenizer_json import GPT2_PATTERN, read_ranks, split_rules

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type`."""

QWEN2_PATTERN = SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of Mistral Nemo, whose GGUF files are of architecture llama."""

PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), (SPLIT_PATTERN,)
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), (SPLIT_PATTERN,)),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "phi-2", "exaone4"), (GPT2_PATTERN,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", GPT2_PATTERN)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), (QWEN2_PATTERN,)),
    "tekken": (TEKKEN_PATTERN,),
}
"""How a text is cut before BPE, by `tokenizer.ggml.pre`: patterns applied one after the other."""
BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""Those that begin a text with BOS where `tokenizer.ggml.add_bos_token` is not there, and take a word that is a token whole."""
OTHER_MODELS = {
    "llama": "SentencePiece",
    "bert": "WordPiece",
    "t5": "Unigram (SentencePiece)",
    "rwkv": "RWKV's trie",
}


class _Keys(NamedTuple):
    """The metadata, and the file's name for messages."""

    values: Mapping[str, Any]
    where: str

    def get(self, name: str) -> Any:
        return self.values.get(f"tokenizer.ggml.{name}")

    def strings(self, name: str) -> list[str]:
        found = self.get(name)
        if not isinstance(found, Sequence) or isinstance(found, str) or not all(isinstance(one, str) for one in found):
            raise ValueError(f"{self.where}: tokenizer.ggml.{name}: expected a list of strings, found {_short(found)}")
        return list(found)

    def token(self, name: str, tokens: Sequence[str]) -> str:
        """The token whose id stands under `name`; empty where none does. ValueError for an id outside the vocabulary."""
        index = self.get(f"{name}_token_id")
        if index is None:
            return ""
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise ValueError(
                f"{self.where}: tokenizer.ggml.{name}_token_id is {_short(index)}; expected 0 to {len(tokens) - 1:,}"
            )
        return tokens[index]


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str = "GGUF") -> Tokenizer:
    """The tokenizer of `metadata`, with its chat template and what it says of BOS. `where` names the file in messages.

    ValueError, naming the key, for vocabularies that are not byte-level BPE, for pre-tokenizers that are not known, and for
    metadata that contradicts itself.
    """
    keys = _Keys(metadata, where)
    model, pre = keys.get("model"), keys.get("pre")
    if model != "gpt2":
        kind = OTHER_MODELS.get(str(model), "unknown")
        raise ValueError(
            f"{where}: tokenizer.ggml.model is {model!r} ({kind}); expected 'gpt2' (byte-level BPE), as in Llama 3 and SmolLM2"
        )
    if not isinstance(pre, str) or pre not in PATTERNS:
        raise ValueError(
            f"{where}: tokenizer.ggml.pre is {pre!r}; expected one of {', '.join(PATTERNS)}; convert the model anew"
        )
    tokens = keys.strings("tokens")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.tokens holds a token twice")
    kinds = _kinds(keys, tokens)
    pieces = {token: index for index, token in enumerate(tokens) if kinds[index] in (NORMAL, UNKNOWN, BYTE)}
    specials = {token: index for index, token in enumerate(tokens) if kinds[index] in (CONTROL, USER_DEFINED)}
    merges = keys.strings("merges")
    ranks = read_ranks(where, {"vocab": pieces, "merges": merges, "ignore_merges": pre in BOS_BY_DEFAULT}, frozenset())
    return Tokenizer(ranks, specials, _rules(keys, tokens, kinds, specials))


def _kinds(keys: _Keys, tokens: Sequence[str]) -> list[int]:
    """The type of each token; those that begin and end a text are control tokens whatever is said of them."""
    found = keys.get("token_type")
    numbers = isinstance(found, Sequence) and all(isinstance(kind, int) for kind in found)
    if not numbers or len(found) != len(tokens):
        raise ValueError(f"{keys.where}: tokenizer.ggml.token_type: expected {len(tokens):,} numbers, found {_short(found)}")
    ends = {keys.token(name, tokens) for name in ("bos", "eos")}
    return [CONTROL if token in ends else kind for token, kind in zip(tokens, found, strict=True)]


def _rules(keys: _Keys, tokens: Sequence[str], kinds: Sequence[int], specials: Mapping[str, int]) -> TextRules:
    pre = keys.get("pre")
    pre_split, pattern = split_rules(keys.where, PATTERNS[pre])
    default = TextRules()
    bos, eos = keys.token("bos", tokens) or default.bos, keys.token("eos", tokens) or default.eos
    ends = {keys.token(name, tokens) for name in ("eot", "eom")} & set(specials)
    adds_bos, template = keys.get("add_bos_token"), keys.values.get("tokenizer.chat_template")
    named = {f"{name}_token": keys.token(key, tokens) for name, key in (("unk", "unknown"), ("pad", "padding"))}
    return TextRules(
        pattern,
        pre_split,
        frozenset(token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED),
        bos,
        eos,
        default.stops | ends,
        adds_bos if isinstance(adds_bos, bool) else pre in BOS_BY_DEFAULT,
        template if isinstance(template, str) else "",
        {name: token for name, token in named.items() if token} | {"bos_token": bos, "eos_token": eos},
    )


def _short(found: Any) -> str:
    return f"{len(found):,} entries" if isinstance(found, list | tuple) else f"{found!r:.40}"

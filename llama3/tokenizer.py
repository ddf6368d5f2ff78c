"""Text to token ids and back: byte-level BPE through tiktoken, from Llama 3's `tokenizer.model` or a `tokenizer.json`."""

import base64
import binascii
import codecs
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import regex  # type: ignore[import-untyped]
import tiktoken

log = logging.getLogger("llama3.tokenizer")

Bos = Literal["auto", "feed", "none"]
"""Whether BOS stands before a text: as the model was trained (`TextRules.add_bos`), always, never."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before BPE; from `models/llama3/tokenizer.py` of meta-llama/llama-models."""

NAMED_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
N_SPECIAL_TOKENS = 256

# tiktoken's regex engine overflows its stack on very long inputs and on very long runs of one class (about a million spaces).
MAX_CHARACTERS = 400_000
MAX_RUN = 25_000


def long_run(length: int) -> "re.Pattern[str]":
    """Finds `length` spaces, or as many other characters, that more of their kind follow."""
    return re.compile(rf"\s{{{length}}}(?=\s)|\S{{{length}}}(?=\S)")


LONG_RUN = long_run(MAX_RUN)


def special_tokens(n_ranks: int) -> dict[str, int]:
    """Ids of Llama 3's 256 special tokens: they follow the last rank, wherever that is."""
    names = list(NAMED_SPECIAL_TOKENS)
    names += [f"<|reserved_special_token_{2 + i}|>" for i in range(N_SPECIAL_TOKENS - len(names))]
    return {name: n_ranks + i for i, name in enumerate(names)}


@dataclass(frozen=True)
class TextRules:
    """What a byte-level BPE tokenizer has beside its vocabulary; the defaults are Llama 3's."""

    pattern: str = SPLIT_PATTERN
    """How text is cut before BPE; must match every character."""
    pre_split: tuple[str, ...] = ()
    """Patterns, applied one after the other before `pattern`, whose matches become words of their own."""
    always: frozenset[str] = frozenset()
    """Added tokens that are not special: recognised wherever they stand in a text."""
    bos: str = "<|begin_of_text|>"
    eos: str = "<|end_of_text|>"
    stops: frozenset[str] = frozenset({"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"})
    """Tokens that end a generated text, as far as the vocabulary has them."""
    add_bos: bool = True
    """Whether the model was trained on texts that begin with `bos`. Changes no token of a text: no part of the hash."""
    chat_template: str = ""
    """Jinja source of the model's chat format; empty where the checkpoint brings none. No part of the hash."""
    template_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the names that `chat_template` uses, such as bos_token."""


class Tokenizer:
    """Byte-level BPE with special tokens. `n_vocab` counts both; `hash` identifies ranks, rules and special tokens.

    Bytes that the vocabulary has no token for are dropped, as Hugging Face drops them, with one warning.
    """

    def __init__(self, ranks: dict[bytes, int], specials: dict[str, int], rules: TextRules | None = None) -> None:
        rules = rules or TextRules()
        for name in (rules.bos, rules.eos):
            if name not in specials:
                raise ValueError(f"no special token {name!r} in this tokenizer; it has {', '.join(list(specials)[:5])}")
        self._bpe = tiktoken.Encoding("llama3", pat_str=rules.pattern, mergeable_ranks=ranks, special_tokens=specials)
        self._pre_split = [regex.compile(pattern) for pattern in rules.pre_split]
        self._pattern = regex.compile(rules.pattern)
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self._warned = False
        self._find_special = _alternatives(set(specials))
        self._find_always = _alternatives(rules.always)
        self.rules = rules
        self.special_tokens = specials
        self.n_vocab = self._bpe.n_vocab
        self.unassigned = sorted(set(range(self.n_vocab)) - set(ranks.values()) - set(specials.values()))
        self.bos_id = specials[rules.bos]
        self.eos_id = specials[rules.eos]
        self.pad_id = specials.get("<|finetune_right_pad_id|>", self.eos_id)
        self.stop_ids = frozenset({self.eos_id, *(specials[name] for name in rules.stops if name in specials)})
        self._special_ids = frozenset(index for name, index in specials.items() if name not in rules.always)
        self.hash = _hash(ranks, specials, rules)
        self.encode_part = lru_cache(maxsize=8192)(self._encode_part)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read Meta's `tokenizer.model`: lines of `base64(token) rank`, ranks counting from 0. ValueError if it is not so."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise ValueError(f"{path}: line {number} is not 'base64 rank'; this is not a Llama 3 tokenizer.model") from None
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"{path}: ranks must count from 0 without gaps; found {len(ranks)} tokens")
        if any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError(f"{path}: holds no token for some single bytes, so not every text could be encoded; it is damaged")
        return cls(ranks, special_tokens(len(ranks)))

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. Text that spells a special token stays plain text unless `allow_special`."""
        ids = [self.bos_id] if bos else []
        find = self._find_special if allow_special else self._find_always
        for i, part in enumerate(find.split(text) if find else [text]):
            if i % 2:  # `split` returns what it found between what it did not
                ids.append(self.special_tokens[part])
                continue
            for piece in _pieces(part):
                ids += self._encode_plain(piece)
        return [*ids, self.eos_id] if eos else ids

    def split_special(self, text: str) -> list[str]:
        """`text` cut at the special tokens that it spells, added ones included, which stand at the odd places."""
        return self._find_special.split(text) if self._find_special else [text]

    def start(self, bos: Bos = "auto") -> list[int]:
        """The ids that stand before a text: BOS or none."""
        return [self.bos_id] if (self.bos_policy if bos == "auto" else bos) == "feed" else []

    @property
    def bos_policy(self) -> Bos:
        """What `start` does by itself, as manifests record it: feed or none."""
        return "feed" if self.rules.add_bos else "none"

    def encode_prompt(self, text: str, bos: Bos = "auto") -> list[int]:
        """Token ids of a text as the model met texts in training: behind `start`."""
        return self.start(bos) + self.encode(text)

    def _encode_part(self, text: str) -> tuple[int, ...]:
        """`encode_part`: plain text as `encode` has it, remembered, since the parts of a dialogue come again with each turn."""
        return tuple(self.encode(text))

    def _encode_plain(self, text: str) -> list[int]:
        if self._missing:
            data = text.encode(errors="replace")
            if len(data.translate(None, self._missing)) < len(data):
                return self._encode_what_is_known(text)
        return [i for word in self._words(text) for i in self._bpe.encode_ordinary(word)]

    def _encode_what_is_known(self, text: str) -> list[int]:
        """For a text with bytes that have no token: they are dropped from each word, and what is left merges."""
        if not self._warned:
            self._warned = True
            log.warning("characters for whose bytes this vocabulary has no token are dropped (%s)", _named(self._missing))
        # Lone surrogates become U+FFFD, as in tiktoken itself.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        for part in self._words(text):
            for word in _isolate(self._pattern, part):
                known = word.encode().translate(None, self._missing)
                ids += self._bpe._encode_single_piece(known) if known else []
        return ids

    def _words(self, text: str) -> list[str]:
        words = [text]
        for pattern in self._pre_split:
            words = [word for part in words for word in _isolate(pattern, part)]
        return words

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids if not (skip_special and i in self._special_ids)).decode(
            errors="replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. ValueError for an id that the vocabulary does not have."""
        try:
            return self._bpe.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError):
            raise ValueError(f"token id {token_id} is not in this tokenizer of {self.n_vocab:,} ids") from None

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One string a token, which together read as `decode(ids)`: bytes of a character that spans several tokens appear with
        its last one."""
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        pieces = [decode(self.token_bytes(i)) for i in ids]
        if pieces:
            pieces[-1] += decode(b"", True)
        return pieces

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for text that arrives token by token."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes one token at a time and holds back the bytes of a character that is not complete yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` so that no piece exceeds MAX_CHARACTERS and no run of spaces or of non-spaces exceeds MAX_RUN."""
    for start in range(0, len(text), MAX_CHARACTERS):
        block = text[start : start + MAX_CHARACTERS]
        begin = 0
        # `run` is as long as MAX_RUN and followed by more of its kind: the cut comes right behind it.
        for run in LONG_RUN.finditer(block):
            yield block[begin : run.end()]
            begin = run.end()
        if begin < len(block):
            yield block[begin:]


def _isolate(pattern: "regex.Pattern[str]", text: str) -> Iterator[str]:
    """`text` cut into the matches of `pattern` and what lies between them."""
    at = 0
    for match in pattern.finditer(_as_tiktoken_sees(text)):
        yield from (part for part in (text[at : match.start()], text[match.start() : match.end()]) if part)
        at = match.end()
    if at < len(text):
        yield text[at:]


def _as_tiktoken_sees(text: str) -> str:
    """`text` with U+E000 for letters and digits of a later Unicode than tiktoken's, so that `regex` cuts it in the same way."""
    if text.isascii():
        return text
    later = {ord(character): "\ue000" for character in set(text) if _is_later(character)}
    return text.translate(later) if later else text


@cache
def _is_later(character: str) -> bool:
    return regex.match(r"[\p{L}\p{N}]", character) is not None and bool(_neither().encode_ordinary(character))


@cache
def _neither() -> tiktoken.Encoding:
    """Leaves of a text, as bytes, what tiktoken takes for neither letter nor digit."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("neither", pat_str=r"[^\p{L}\p{N}]", mergeable_ranks=ranks, special_tokens={})


def _named(missing: bytes) -> str:
    return f"{len(missing)}: {', '.join(f'0x{byte:02x}' for byte in missing[:3])}, ..."


def _alternatives(names: Iterable[str]) -> "re.Pattern[str] | None":
    """Finds any of `names`, the longest first; None where there are none."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _hash(ranks: dict[bytes, int], specials: dict[str, int], rules: TextRules) -> str:
    digest = hashlib.sha256("\0".join((rules.pattern, *rules.pre_split, *sorted(rules.always))).encode())
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %s\n" % (rank, base64.b64encode(token)))
    for name, index in sorted(specials.items(), key=lambda item: item[1]):
        digest.update(f"{index} {name}\n".encode())
    return digest.hexdigest()[:16]

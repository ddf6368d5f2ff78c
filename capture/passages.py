"""Text to passages of a fixed number of tokens, cut between words."""

import re
from collections.abc import Iterator
from functools import lru_cache

from llama3 import Tokenizer

WORD = re.compile(r"\s*\S+")  # a word with the white space before it, as BPE sees it too
WORDS_KEPT = 2**16  # words whose number of tokens is remembered
LONGEST_WORD = 256  # characters; what is longer (a line of base64, a text without spaces) is cut


class Passages:
    """Cuts text into passages of at most `n_tokens` tokens, each as long as the next word allows. `hash` identifies how.

    A word of more than `n_tokens` tokens is a passage of its own, which capture cuts at its --max-length.
    """

    def __init__(self, tokenizer: Tokenizer, n_tokens: int) -> None:
        self.hash = f"{tokenizer.hash}-{n_tokens}"
        self._n_tokens = n_tokens
        self._tokenizer = tokenizer
        self._count = lru_cache(WORDS_KEPT)(lambda word: len(tokenizer.encode(word)))

    def units(self, text: str) -> Iterator[str]:
        """The passages in order, as they stand in `text`, without white space around them."""
        begin = end = count = 0
        for start, stop in _words(text):
            n = self._count(text[start:stop])
            if count and count + n > self._n_tokens:
                # Words were counted one by one; a first word without its space may be a token more than that.
                yield text[begin:end].strip()
                begin, count = start, 0
                n = self._count(text[start:stop].strip())
            count, end = count + n, stop
        if rest := text[begin:].strip():
            yield rest


def _words(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each word with the white space before it."""
    for match in WORD.finditer(text):
        for start in range(match.start(), match.end(), LONGEST_WORD):
            yield start, min(start + LONGEST_WORD, match.end())

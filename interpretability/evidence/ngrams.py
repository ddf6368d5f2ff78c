"""One to three words that are over-represented in a latent's top sentences, against a sample of the corpus.

Counted are sentences that hold them. The score is the log-odds ratio with an informative Dirichlet prior over its standard
deviation (Monroe, Colaresi and Quinn 2008, "Fightin' Words", Political Analysis 16:372, section 3.5.1), for each length apart.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from interpretability.labels.words import is_content, units_of

LONGEST = 3
PRIOR = 1000.0
"""Weight of the prior, in n-grams."""
MIN_Z = 2.5
MIN_SENTENCES = 2
MIN_SHARE = 0.1

Ngram = tuple[str, ...]


def ngrams_of(text: str) -> frozenset[Ngram]:
    """All runs of one to LONGEST words, folded, that hold a word of meaning."""
    words = units_of(text).folded
    return frozenset(
        gram
        for n in range(1, LONGEST + 1)
        for gram in zip(*(words[i:] for i in range(n)), strict=False)
        if any(map(is_content, gram))
    )


class NgramCounter:
    """Compares sentences with `background`, a sample of the corpus."""

    def __init__(self, background: Iterable[str]) -> None:
        self._counts: Counter[Ngram] = Counter()
        for text in background:
            self._counts.update(ngrams_of(text))
        self._totals = Counter[int]()
        for gram, count in self._counts.items():
            self._totals[len(gram)] += count

    def strongest(self, sentences: Sequence[frozenset[Ngram]], n: int) -> list[dict[str, Any]]:
        """The `n` n-grams that set `sentences` apart most; of those in the same sentences only the longest."""
        here = Counter(gram for grams in sentences for gram in grams)
        totals = Counter[int]()
        for gram, count in here.items():
            totals[len(gram)] += count
        needed = max(MIN_SENTENCES, MIN_SHARE * len(sentences))
        scored = [(self._z(gram, count, totals), gram) for gram, count in here.items() if count >= needed]
        scored = sorted(((z, gram) for z, gram in scored if z >= MIN_Z), key=lambda item: (-item[0], item[1]))
        found: list[dict[str, Any]] = []
        for z, gram in scored:
            if len(found) == n:
                break
            if not any(_part(gram, other) and here[gram] == here[other] for _, other in scored):
                found.append({"text": " ".join(gram), "count": here[gram], "z": round(z, 2)})
        return found

    def _z(self, gram: Ngram, here: int, totals: Counter[int]) -> float:
        rest, n_here, n_rest = self._counts[gram], totals[len(gram)], self._totals[len(gram)]
        alpha = PRIOR * (here + rest) / (n_here + n_rest)
        odds_here = (here + alpha) / (n_here + PRIOR - here - alpha)
        odds_rest = (rest + alpha) / (n_rest + PRIOR - rest - alpha)
        return math.log(odds_here / odds_rest) / math.sqrt(1 / (here + alpha) + 1 / (rest + alpha))


def ngrams_of_rows(
    table: pa.Table, aggregation: str, counter: NgramCounter, n: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each latent of a block of `top_sentences.parquet` with the strongest n-grams of its top sentences by `aggregation`."""
    rows = table.filter(pc.equal(table["aggregation"], aggregation)).select(["latent", "sentence_id", "text"]).to_pydict()
    texts = dict(zip(rows["sentence_id"], rows["text"], strict=True))
    known = {i: ngrams_of(text) for i, text in texts.items()}
    for latent, group in groupby(zip(rows["latent"], rows["sentence_id"], strict=True), key=itemgetter(0)):
        yield latent, counter.strongest([known[i] for _, i in group], n)


def _part(gram: Ngram, other: Ngram) -> bool:
    return len(gram) < len(other) and any(other[i : i + len(gram)] == gram for i in range(len(other) - len(gram) + 1))

"""Explanations without any model: the words that a latent fires on, and the words that set its sentences apart from the rest.

The label comes from every second of a latent's top sentences (ranks 0, 2, 4 ...); the others are kept to score it. Words that
set sentences apart are found by log-odds with an informative Dirichlet prior, the counts in all sentences (Monroe, Colaresi and
Quinn 2008, "Fightin' Words", Political Analysis 16:372, section 3.5.1).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import xxhash

from interpretability.labels.label_score import Score, score
from interpretability.labels.patterns import EXACT, FiringSentence, Found, Pattern, Sample, best_pattern
from interpretability.labels.titles import Clues, in_words, listed, title_of
from interpretability.labels.words import Units, firings, is_content, spellings, units_of
from interpretability.records import Explanation, LatentStatistics, PoolSentence, TopSentence, TopSentences

K = TypeVar("K")

NAME = "token_statistics"
PRIOR_WORDS = 1000.0
"""Weight of the prior, in words: what a word's share in the whole corpus counts against its share in the top sentences."""
MIN_Z = 2.5
MAX_APART = 8
MIN_SHARE = 0.1
"""Share of the sentences in which a word must be to set them apart; in two of them at the least."""
COMMON = 0.25
"""Share of the sentences in which a word must be to stand in a title beside what the latent fires on."""
TOPIC_SHARE = 0.6
MIN_LABELLED = 3
DENSE = 0.1
"""Share of all tokens above which a latent is called dense."""
SPREAD = 0.3
"""Share of a sentence's words above which a latent fires on the text and not on single words."""


class Apart(NamedTuple):
    """A word that sets a latent's sentences apart."""

    word: str
    z: float
    """Log-odds ratio over its standard deviation."""
    sentences: int
    """Of the sentences looked at, how many hold it."""


class Topic(NamedTuple):
    """A label that most labelled sentences share."""

    name: str
    share: float
    labelled: int


class Evidence(NamedTuple):
    """What is known of one latent before it is described."""

    statistics: LatentStatistics
    shown: list[TopSentence]
    held_out: list[TopSentence]


class TokenStatistics:
    """The backend that needs no model.

    `rest` are the sentences that a latent's own are compared with; of them `n_others`, drawn by `seed`, test its label.
    """

    name = NAME
    model = ""

    def __init__(self, top: TopSentences, rest: Sequence[PoolSentence], n_others: int, seed: int) -> None:
        self._top = top
        self._documents: Counter[str] = Counter()  # sentences that hold a word
        self._words = 0
        for sentence in rest:
            words = set(units_of(sentence.text).folded)
            self._documents.update(words)
            self._words += len(words)
        self._labels = Counter(sentence.label for sentence in rest if sentence.label is not None)
        drawn = sorted(rest, key=lambda s: xxhash.xxh3_64_intdigest(s.text.encode(), seed))[:n_others]
        self._bit = {sentence.sentence_id: 1 << i for i, sentence in enumerate(drawn)}
        self._sample = Sample([units_of(sentence.text) for sentence in drawn])

    def explain(self, latents: Sequence[int]) -> Iterator[Explanation]:
        """An explanation a latent, in order; state `failed` for one without sentences."""
        for latent in latents:
            sentences = self._top.sentences(latent, "max")
            if not sentences:
                yield Explanation(latent, "", "", self.name, self.model, "failed", reason=self._top.silence(latent))
                continue
            shown, held_out = split(sentences)
            yield self._explain(Evidence(self._top.statistics(latent), shown, held_out))

    def score_of(self, latent: int, words: Sequence[str]) -> Score | None:
        """How well the presence of one of `words` (in lower case) predicts firing, on the latent's sentences of odd rank."""
        shown, held_out = split(self._top.sentences(latent, "max"))
        return self._score(Pattern("word", tuple(words)), Evidence(self._top.statistics(latent), shown, held_out))

    def _explain(self, evidence: Evidence) -> Explanation:
        sentences = list(_firing_sentences(evidence.shown))
        found = best_pattern(sentences, self._sample)
        pattern = found.pattern if found else None
        units = [units_of(sentence.text) for sentence in evidence.shown]
        apart = self._apart(units, pattern.words if pattern else ())
        topic = self._topic(evidence.shown)
        clues = _clues(sentences, pattern, apart, topic.name if topic else None)
        tested = pattern or _words_of(clues)
        measured = self._score(tested, evidence) if tested else None
        spelt = {item.word.lower(): item.word for item in apart} | dict(clues.surfaces)
        details = {
            "fires_on": found and _fires_on(found, clues.surfaces),
            "tokens": _tokens(sentences),
            "words": [{"word": item.word, "z": round(item.z, 2), "sentences": item.sentences} for item in apart],
            "topic": topic and _topic_details(topic, evidence.held_out),
            "sentences": {"shown": len(evidence.shown), "held_out": len(evidence.held_out)},
            "score": tested
            and measured
            and {"name": "balanced accuracy", "pattern": in_words(tested, spelt)} | measured._asdict(),
        }
        return Explanation(
            latent=evidence.statistics.latent,
            title=title_of(pattern, clues),
            explanation=" ".join(_sentences(evidence, details)),
            method=self.name,
            model=self.model,
            state="valid",
            details=details,
            score=round(measured.score, 4) if measured else None,
        )

    def _apart(self, shown: Sequence[Units], without: Sequence[str]) -> list[Apart]:
        """Content words that set the sentences `shown` apart from all others, the strongest first."""
        counts = Counter(word for units in shown for word in set(units.folded))
        n_here = counts.total()
        n_rest, prior = self._words - n_here, PRIOR_WORDS / self._words
        needed = max(min(2, len(shown)), MIN_SHARE * len(shown))
        apart = []
        for word, here in counts.items():
            if here < needed or word in without or not is_content(word):
                continue
            rest, alpha = max(0, self._documents[word] - here), prior * self._documents[word]
            odds_here = (here + alpha) / (n_here + PRIOR_WORDS - here - alpha)
            odds_rest = (rest + alpha) / (n_rest + PRIOR_WORDS - rest - alpha)
            z = math.log(odds_here / odds_rest) / math.sqrt(1 / (here + alpha) + 1 / (rest + alpha))
            if z >= MIN_Z:
                apart.append(Apart(word, z, here))
        best = sorted(apart, key=lambda item: (-item.z, item.word))[:MAX_APART]
        spelt = spellings({item.word for item in best}, shown)
        return [item._replace(word=spelt[item.word]) for item in best]

    def _topic(self, shown: Sequence[TopSentence]) -> Topic | None:
        """The label that at least TOPIC_SHARE of the labelled sentences share, where enough are labelled and it is no wonder of
        the corpus: half as frequent again as among all sentences."""
        labels = Counter(sentence.label for sentence in shown if sentence.label is not None)
        labelled = labels.total()
        if labelled < max(MIN_LABELLED, 0.4 * len(shown)):
            return None
        name, count = min(labels.items(), key=lambda item: (-item[1], item[0]))
        share = count / labelled
        usual = self._labels[name] / self._labels.total()
        return Topic(name, share, labelled) if share >= max(TOPIC_SHARE, 1.5 * usual) else None

    def _score(self, pattern: Pattern, evidence: Evidence) -> Score | None:
        own = 0
        for sentence in (*evidence.shown, *evidence.held_out):
            own |= self._bit.get(sentence.sentence_id, 0)
        held_out = [units_of(sentence.text) for sentence in evidence.held_out]
        return score(pattern, held_out, self._sample, self._sample.all & ~own)


def split(sentences: Sequence[TopSentence]) -> tuple[list[TopSentence], list[TopSentence]]:
    """Sentences to describe and sentences to score by, in turn down the ranks; a text that comes twice counts once."""
    unique = list({sentence.text: sentence for sentence in reversed(sentences)}.values())[::-1]
    unique.sort(key=lambda sentence: sentence.rank)
    return unique[0::2], unique[1::2]


def _firing_sentences(shown: Sequence[TopSentence]) -> Iterator[FiringSentence]:
    """Sentences in which some word fires (white space alone may), each with its activation shared out among its words."""
    for sentence in shown:
        fired = firings(sentence.tokens, sentence.activations)
        if fired:
            total = sum(firing.activation for firing in fired)
            yield FiringSentence(units_of("".join(sentence.tokens)), fired, [firing.activation / total for firing in fired])


def _clues(sentences: Sequence[FiringSentence], pattern: Pattern | None, apart: Sequence[Apart], topic: str | None) -> Clues:
    mass: defaultdict[str, float] = defaultdict(float)
    written: defaultdict[tuple[str, str], float] = defaultdict(float)
    examples: set[str] = set()
    for units, fired, shares in sentences:
        for firing, share in zip(fired, shares, strict=True):
            folded = units.folded[firing.unit]
            mass[folded] += share
            written[folded, units.surfaces[firing.unit]] += share
            if pattern is None or pattern.kind in EXACT or pattern.fits(units, firing.unit):
                examples.add(folded)
    # The last to set a folded word is the spelling with the most activation.
    spelt = dict(reversed(_ranked(written)))
    surfaces = {folded: spelt[folded] for folded in _ranked(mass)}
    return Clues(
        topic=topic,
        fired=[surface for folded, surface in surfaces.items() if folded in examples and _is_example(folded)],
        apart=[item.word for item in apart],
        common=[item.word for item in apart if item.sentences >= max(2, COMMON * len(sentences))],
        surfaces=surfaces,
        spread=sum(len(s.firings) / len(s.units.folded) for s in sentences) > SPREAD * len(sentences),
    )


def _ranked(mass: Mapping[K, float]) -> list[K]:
    """The keys, the largest value first; equal ones as they came."""
    return sorted(mass, key=lambda key: -mass[key])


def _words_of(clues: Clues) -> Pattern | None:
    """What a label without a pattern stands or falls by: its words."""
    fired, apart = clues.fired[:MAX_APART], clues.apart
    words = (apart or fired) if clues.spread else [*fired, *apart]
    return Pattern("word", tuple(dict.fromkeys(word.lower() for word in words))) if words else None


def _is_example(folded: str) -> bool:
    return is_content(folded) or folded[0].isdigit()


def _fires_on(found: Found, surfaces: Mapping[str, str]) -> dict[str, Any]:
    return {
        "text": in_words(found.pattern, surfaces),
        "kind": found.pattern.kind,
        "words": list(found.pattern.words),
        "share": round(found.coverage, 3),
        "base": round(found.base, 6),
    }


def _tokens(sentences: Sequence[FiringSentence]) -> list[dict[str, Any]]:
    """The model's tokens that carry the most activation, with their share of it and their mean activation."""
    shares: defaultdict[str, float] = defaultdict(float)
    values: defaultdict[str, list[float]] = defaultdict(list)
    for sentence in sentences:
        for firing, share in zip(sentence.firings, sentence.shares, strict=True):
            shares[firing.token] += share / len(sentences)
            values[firing.token].append(firing.activation)
    return [
        {"token": token, "share": round(shares[token], 3), "mean": round(sum(values[token]) / len(values[token]), 3)}
        for token in _ranked(shares)[:8]
    ]


def _topic_details(topic: Topic, held_out: Sequence[TopSentence]) -> dict[str, Any]:
    labels = [sentence.label for sentence in held_out if sentence.label is not None]
    agreeing = {"held_out_labelled": len(labels), "held_out_agreeing": labels.count(topic.name)}
    return {"name": topic.name, "share": round(topic.share, 3), "labelled": topic.labelled} | agreeing


def _sentences(evidence: Evidence, details: Mapping[str, Any]) -> Iterator[str]:
    """The explanation, a sentence at a time."""
    statistics, fires_on, tested = evidence.statistics, details["fires_on"], details["score"]
    if fires_on:
        yield f"Fires on {fires_on['text']}: {fires_on['share']:.0%} of its activation in {_count(evidence.shown)}."
    elif details["tokens"]:
        yield f"Fires on various words, most on {listed([repr_token(item['token']) for item in details['tokens'][:4]])}."
    else:
        yield "Fires on white space or parts of characters."
    if topic := details["topic"]:
        yield f"{topic['share']:.0%} of its {topic['labelled']} labelled sentences are about {topic['name']}."
    if details["words"]:
        yield f"Its sentences stand out by {listed([item['word'] for item in details['words'][:5]])}."
    if statistics.promoted:
        yield f"It raises {listed([repr_token(token) for token in statistics.promoted[:4]])} as the next token."
    if statistics.density > DENSE:
        yield f"It fires on {statistics.density:.0%} of all tokens, too many for one clear meaning."
    if tested:
        yield (
            f"Of {_count(evidence.held_out)} kept aside, {tested['found']} hold {tested['pattern']}; "
            f"of {tested['others']} others, {tested['others_found']}."
        )
    else:
        yield "Too few sentences to put the label to the test."


def _count(sentences: Sequence[TopSentence]) -> str:
    return f"{len(sentences)} top sentence{'s' if len(sentences) > 1 else ''}"


def repr_token(token: str) -> str:
    """A token for the reader: quoted, with line breaks and the like spelt out."""
    return f'"{token.strip()}"' if token.strip() else repr(token)

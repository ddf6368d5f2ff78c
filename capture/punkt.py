"""Text to sentences: Punkt (Kiss and Strunk 2006, Computational Linguistics 32:485-525) with a small model of our own.

python -m capture.punkt --text documents.jsonl state_union/ inaugural/ --encoding latin-1 --out capture/punkt.json

The model is learned without supervision by NLTK's trainer from at most --max-bytes of text; the abbreviations listed here are
added, because a few megabytes do not hold them all. It lies beside this file, so that every machine cuts sentences alike.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import nltk.data
import xxhash
from nltk.tokenize.punkt import (
    PunktLanguageVars,
    PunktParameters,
    PunktSentenceTokenizer,
    PunktToken,
    PunktTrainer,
    load_punkt_params,
)

from capture.sources import Document, open_source
from core import files
from core.cli import one_line_errors, parse, set_up_logging

MODEL = Path(__file__).with_name("punkt.json")

TITLES = "mr mrs ms messrs mme mlle dr prof gen lt col capt cpt cmdr adm sgt cpl sen rep gov pres rev hon fr supt st mt ft"
LATIN = "e.g i.e cf viz vs v.s al ibid resp approx incl excl esp ca n.b eg ie"
PLACES = "u.s u.s.a u.k u.n e.u u.s.s.r d.c n.y l.a b.c a.d b.c.e c.e"
TIMES = "a.m p.m jan feb apr aug sept oct nov dec mon tues wed thurs fri"
DEGREES = "ph.d m.d b.a m.a b.sc m.sc ll.b ll.m m.b.a d.d.s r.n jr sr esq"
BUSINESS = "inc ltd co corp bros llc plc assn dept univ est ave blvd rd"
ABBREVIATIONS = frozenset(f"{TITLES} {LATIN} {PLACES} {TIMES} {DEGREES} {BUSINESS} etc ed eds trans repr misc".split())
"""Words that may carry a period inside a sentence; whether one ends there is decided by the word that follows."""

_NUMBERED = "no nos fig figs sec secs ch chap chaps vol vols art eq eqs p pp para pt ref refs par v mar jun jul"
BEFORE_NUMBERS = frozenset(_NUMBERED.split())
"""Words that are abbreviations only before a number, as in "No. 5"; elsewhere they end sentences ("He said no.")."""
NUMBER = "##number##"  # how Punkt spells every number

_NEVER_LAST = "|".join(re.escape(word) for word in f"{TITLES} e.g i.e cf viz vs v.s resp approx".split())
_NOT_AN_END = re.compile(rf"(?:^|[\s(\[\"'“‘/-])(?:{_NEVER_LAST})\.$", re.IGNORECASE)
_GOES_ON = re.compile(r"(?:[.?!][\"'”’»)\]]+|\.[^\W\d]\.)$")
"""Ends in quotation marks or brackets, and acronyms: before a lower-case word the sentence goes on ("Why?" he asked)."""
_LINE_ENDS = (".", "!", "?", ":", ";", '"', "'", ")", "”", "’", "…")
_INITIAL = re.compile(r"(?:^|[\s(\"“‘])[A-Z]\.$")
_INITIAL_NEXT = re.compile(r"[A-Z]\.\s")

Lines = Literal["auto", "paragraphs", "wrapped"]


WINDOW = 2**16
"""Characters that Punkt sees at a time. A longer paragraph is cut in windows, each of which begins where a sentence does."""
_TERMINATORS = "。｡！？।॥؟۔።፧။។៕"
"""Marks that end a sentence in scripts that may put no space behind them: Chinese and Japanese, Devanagari, Arabic and Urdu,
Ethiopic, Burmese, Khmer. None of them occurs in a Latin text."""
_CLOSING = re.escape("\"')]}”’»」』】）〉》］")
_FOREIGN_END = re.compile(rf"[{_TERMINATORS}]+[{_CLOSING}]*")


class _Patterns(PunktLanguageVars):  # type: ignore[misc]
    """NLTK's own patterns, compiled by `re`: since NLTK 3.10 its own give up after 5 s, and so a slow machine fails where a
    fast one does not. WINDOW bounds them instead.
    """

    def __init__(self) -> None:
        self._re_period_context = re.compile(
            self._period_context_fmt % {"NonWord": self._re_non_word_chars, "SentEndChars": self._re_sent_end_chars},
            re.UNICODE | re.VERBOSE,
        )
        words = {"NonWord": self._re_non_word_chars, "MultiChar": self._re_multi_char_punct, "WordStart": self._re_word_start}
        self._re_word_tokenizer = re.compile(self._word_tokenize_fmt % words, re.UNICODE | re.VERBOSE)
        self.re_boundary_realignment = re.compile(PunktLanguageVars.re_boundary_realignment.pattern, re.MULTILINE)


class _Token(PunktToken):  # type: ignore[misc]
    """NLTK's token, whose patterns have the same clock."""

    _RE_ELLIPSIS = re.compile(PunktToken._RE_ELLIPSIS.pattern)
    _RE_NUMERIC = re.compile(PunktToken._RE_NUMERIC.pattern)
    _RE_INITIAL = re.compile(PunktToken._RE_INITIAL.pattern)
    _RE_ALPHA = re.compile(PunktToken._RE_ALPHA.pattern)


class Splitter:
    """Cuts text into sentences. `hash` identifies the model behind it."""

    def __init__(self, parameters: PunktParameters, joins: bool) -> None:
        """`joins`: mend what Punkt has no means for, by the rules for English in this file."""
        parameters.ortho_context = _Orthography(parameters.ortho_context)
        self._punkt = PunktSentenceTokenizer(parameters, lang_vars=_Patterns(), token_cls=_Token)
        self._joins = joins
        self.hash = xxhash.xxh3_64_hexdigest(json.dumps(_as_json(parameters)).encode())

    def sentences(self, text: str, lines: Lines = "auto") -> Iterator[str]:
        """The sentences of `text` in order, as they stand there, without white space around them.

        `lines` says what one line break means: the end of a sentence ("paragraphs"), or no more than a space ("wrapped", for
        text broken to a width); "auto" decides by how the lines end and begin. A blank line always ends a sentence. A sentence
        of more than WINDOW characters is cut.
        """
        for paragraph in _paragraphs(text, lines):
            for part in _after_foreign_ends(paragraph):
                yield from self._cut(part)

    def _cut(self, paragraph: str) -> Iterator[str]:
        """The sentences of a paragraph: those of a window but the last, which may go on behind it; the next begins there."""
        begin = 0
        while begin < len(paragraph):
            window = paragraph[begin : begin + WINDOW]
            spans = self._spans(window)
            if begin + WINDOW < len(paragraph):
                spans = spans[:-1] or [(0, window.rfind(" ", 1) + 1 or WINDOW)]
            for start, end in spans:
                if sentence := window[start:end].strip():
                    yield sentence
            begin += spans[-1][1] if spans else WINDOW

    def _spans(self, text: str) -> list[tuple[int, int]]:
        spans = list(self._punkt.span_tokenize(text))
        return _joined(text, spans) if self._joins else spans


class _Orthography(dict[str, int]):
    """Contexts of words; unlike the defaultdict of NLTK's it does not grow with every unknown word that is looked up."""

    def __missing__(self, word: str) -> int:
        return 0


def _paragraphs(text: str, lines: Lines) -> Iterator[str]:
    for block in re.split(r"\n[^\S\n]*\n", text):
        rows = [row for line in block.split("\n") if (row := line.strip())]
        if lines == "wrapped" or (lines == "auto" and _is_wrapped(rows)):
            yield " ".join(rows)
        else:
            yield from rows


def _after_foreign_ends(paragraph: str) -> Iterator[str]:
    """The paragraph, cut behind the marks of _TERMINATORS, which Punkt does not know."""
    begin = 0
    for end in _FOREIGN_END.finditer(paragraph):
        yield paragraph[begin : end.end()]
        begin = end.end()
    yield paragraph[begin:]


def _is_wrapped(rows: list[str]) -> bool:
    """Whether lines break off in mid-sentence: a third of the breaks have no end before and a small letter behind them."""
    breaks = [not last.endswith(_LINE_ENDS) and first[0].islower() for last, first in pairwise(rows)]
    return any(breaks) and 3 * sum(breaks) >= len(breaks)


def _joined(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans with those merged between which no sentence can end."""
    merged = spans[:1]
    for (_, end), (begin, stop) in pairwise(spans):
        if _goes_on(text[max(merged[-1][0], end - 12) : end], text[begin : begin + 3]):
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((begin, stop))
    return merged


def _goes_on(last: str, first: str) -> bool:
    """Whether the sentence that seems to end with the characters `last` goes on with `first`."""
    if first[0].islower() and _GOES_ON.search(last):
        return True
    return bool(_NOT_AN_END.search(last) or (_INITIAL.search(last) and _INITIAL_NEXT.match(first)))


def load_splitter(punkt: Literal["builtin", "pretrained"] = "builtin", language: str = "english") -> Splitter:
    """Our own model for English, or NLTK's pretrained one for `language`; ValueError where that is not on the machine."""
    if punkt == "builtin":
        if language != "english":
            raise ValueError(f"--language {language}: the built-in Punkt model knows English alone; add --punkt pretrained")
        return Splitter(_from_json(json.loads(MODEL.read_text(encoding="utf-8"))), joins=True)
    try:
        return Splitter(load_punkt_params(nltk.data.find(f"tokenizers/punkt_tab/{language}/")), joins=False)
    except LookupError:
        raise ValueError(
            f"--punkt pretrained: NLTK's data for {language!r} is not on this machine; fetch it with "
            "`python -m nltk.downloader punkt_tab`, or use --punkt builtin"
        ) from None


class _Abbreviations(set[str]):
    """Known abbreviations, of which training may add to the listed ones but not forget them."""

    def remove(self, word: str) -> None:
        if word not in ABBREVIATIONS:
            super().remove(word)


def train(documents: Iterable[Document], max_bytes: int) -> PunktParameters:
    """Punkt's parameters, learned from a sample of `documents` of at most `max_bytes` of UTF-8, with ABBREVIATIONS listed.

    The sample is drawn by a hash of name and text, so that it depends neither on order nor on chance.
    """
    texts: list[str] = []
    for document in sorted(documents, key=lambda d: (xxhash.xxh3_64_hexdigest(f"{d.name}\0{d.text}".encode()), d.name)):
        size = len(document.text.encode())
        if size <= max_bytes:
            max_bytes -= size
            texts.append(document.text)
    trainer = PunktTrainer()
    trainer.get_params().abbrev_types = _Abbreviations(ABBREVIATIONS)
    trainer.train("\n\n".join(texts))
    learned = trainer.get_params()
    # A few megabytes teach abbreviations with periods inside; the others found there are rare words that once ended a sentence.
    # Learned collocations are left out: in documentation they tie a variable at a sentence's end to the word after it.
    acronyms = {word for word in learned.abbrev_types if re.fullmatch(r"[a-z]+(\.[a-z]+)+", word)}
    parameters = PunktParameters()
    parameters.abbrev_types = ABBREVIATIONS | acronyms
    parameters.collocations = {(word, NUMBER) for word in BEFORE_NUMBERS}
    parameters.sent_starters = learned.sent_starters
    frequent = {word for word, count in Counter(re.findall(r"\w+", " ".join(texts).lower())).items() if count > 1}
    parameters.ortho_context = {word: flags for word, flags in learned.ortho_context.items() if flags and word in frequent}
    return parameters


def _as_json(parameters: PunktParameters) -> dict[str, Any]:
    """Parameters in the form of punkt.json: sorted, words of one orthographic context together."""
    contexts: dict[int, list[str]] = {}
    for word, flags in sorted(parameters.ortho_context.items()):
        contexts.setdefault(flags, []).append(word)
    return {
        "abbreviations": " ".join(sorted(parameters.abbrev_types)),
        "collocations": sorted(parameters.collocations),
        "sentence_starters": " ".join(sorted(parameters.sent_starters)),
        "orthography": {str(flags): " ".join(contexts[flags]) for flags in sorted(contexts)},
    }


def _from_json(model: dict[str, Any]) -> PunktParameters:
    parameters = PunktParameters()
    parameters.abbrev_types = set(model["abbreviations"].split())
    parameters.collocations = {(first, second) for first, second in model["collocations"]}
    parameters.sent_starters = set(model["sentence_starters"].split())
    parameters.ortho_context = {word: int(flags) for flags, words in model["orthography"].items() for word in words.split()}
    return parameters


@dataclass(frozen=True, kw_only=True)
class PunktConfig:
    """Flags of the trainer."""

    text: tuple[str, ...]
    """Sources to learn from, each as `--source` of capture.sentences."""
    out: Path = MODEL
    """The model file to write."""
    encoding: str = "utf-8"
    """Encoding of the sources."""
    max_bytes: int = 4_000_000
    """Bytes of text to learn from; more changes little."""


def main() -> None:
    set_up_logging()
    with one_line_errors():
        config = parse(PunktConfig, __doc__)
        documents = (document for spec in config.text for document in open_source(spec, config.encoding))
        parameters = train(documents, config.max_bytes)
        files.replace(config.out, (json.dumps(_as_json(parameters), ensure_ascii=False, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

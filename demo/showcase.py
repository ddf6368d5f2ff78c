"""Three features worth showing: a clear label, sentences that agree with it, and steered text in which the effect is seen."""

import math
import re
import sys
from dataclasses import dataclass

import torch

from core.terminal import printable
from inference.session import InferenceConfig, Session, open_session
from inference.steering import Edit, Recipe
from interpretability.labels.words import is_content, names_content, quoted_words
from interpretability.records import Explanation, TopSentence
from llama3 import Sampling, complete

SHOWN = 3
SENTENCES = 5
MIN_SCORE = 0.75
MIN_PASSAGES = 3
STRENGTHS = (0.5, 1.0, 2.0)
MAX_COST = 1.0
"""Nats per token by which steered text may be less likely to the unsteered model than its own continuation."""
WORD = re.compile(r"[^\W\d_]+")
PROMPTS = ("This morning I", "She looked at the", "We went to the")


@dataclass(frozen=True)
class Steered:
    """A prompt continued without and with one latent added at `strength` multiples of its maximum."""

    prompt: str
    strength: float
    baseline: str
    steered: str
    lift: float
    """How much more of its maximum the latent reaches, per token, on the steered text read by the unsteered model."""
    echoes: int
    """How many more different words that the feature names or promotes stand in the steered text than in the baseline."""
    cost: float
    """Nats per token that the steered text is less likely than the baseline, by the unsteered model."""


@dataclass(frozen=True)
class Feature:
    """One latent with what makes it worth showing."""

    explanation: Explanation
    sentences: list[TopSentence]
    words: frozenset[str]
    """What its label names and what it promotes as the next token, in lower case."""
    steered: Steered


def showcase(config: InferenceConfig, tried: int) -> list[Feature]:
    """Pick three features of an SAE, of the `tried` best candidates, and print them; returns what was printed."""
    session = open_session(config, torch.device("cpu"))
    features = pick(session, tried)
    if not features:
        print("\nNo latent has both a clear label and sentences that agree with it; more text or more steps would help.")
    for number, feature in enumerate(features, 1):
        print(f"\n{'─' * 100}\n{number}. latent {feature.explanation.latent}: {printable(feature.explanation.title)}")
        print(f"   {printable(feature.explanation.explanation)}")
        print("\n".join(f"     {highlighted(sentence)}" for sentence in feature.sentences))
        steered = feature.steered
        print(f"   {steered.prompt!r} continued; set apart: what the feature names or promotes")
        print(f"     as it is      {_marked(steered.baseline, feature.words)}")
        print(f"     steered {steered.strength:+g}x   {_marked(steered.steered, feature.words)}")
    return features


def pick(session: Session, n: int) -> list[Feature]:
    """Of the `n` best candidates, those whose steering is seen best in the text while it stays readable; no label twice."""
    tried = []
    for explanation, sentences in candidates(session)[:n]:
        words = telling_words(session, explanation)
        tried.append(Feature(explanation, sentences, words, steer(session, explanation.latent, words)))
    tried.sort(key=lambda feature: _unfit(feature.steered))
    chosen: list[Feature] = []
    for feature in tried:
        if all(feature.explanation.title != other.explanation.title for other in chosen):
            chosen.append(feature)
    return chosen[:SHOWN]


def candidates(session: Session) -> list[tuple[Explanation, list[TopSentence]]]:
    """Latents named after content words, best scores first, whose sentences come from different documents and hold the words
    that the label quotes, if any; those that live in the passages come before those of the documentation."""
    known = session.needs_features()
    found: list[tuple[bool, float, Explanation, list[TopSentence]]] = []
    for explanation in known.explanations.values():
        words = re.findall(r'"(\w+)"', explanation.title)
        if explanation.state != "valid" or not names_content(explanation.title) or (explanation.score or 0.0) < MIN_SCORE:
            continue
        sentences = _distinct(known.top.sentences(explanation.latent))[:SENTENCES]
        holding = [s for s in sentences if not words or any(word.casefold() in s.text.casefold() for word in words)]
        if len(holding) == SENTENCES:
            told = sum(sentence.label is not None for sentence in sentences)
            found.append((told < MIN_PASSAGES, -(explanation.score or 0.0), explanation, sentences))
    found.sort(key=lambda entry: (*entry[:2], entry[2].latent))
    return [(explanation, sentences) for _, _, explanation, sentences in found]


def _distinct(sentences: list[TopSentence]) -> list[TopSentence]:
    """One sentence of each document, none of fewer than five words, none that fires on its first token alone: without BOS that
    place has no context, and every sentence with that first word ties."""
    kept: dict[str, TopSentence] = {}
    for sentence in sentences:
        peak = max(range(len(sentence.activations)), key=sentence.activations.__getitem__)
        if peak > 0 and len(sentence.text.split()) >= 5:
            kept.setdefault(sentence.document, sentence)
    return list(kept.values())


def telling_words(session: Session, explanation: Explanation) -> frozenset[str]:
    """The words that a label quotes, and the whole words among the tokens that the feature promotes."""
    promoted = session.needs_features().top.statistics(explanation.latent).promoted
    words = [*quoted_words(explanation.title), *(token.strip() for token in promoted if token.startswith(" "))]
    return frozenset(word.casefold() for word in words if word.isalpha() and is_content(word.casefold()))


def _unfit(steered: Steered) -> tuple[float, int, float]:
    """What to sort texts by: readable ones first, then those in which the effect is plain to see."""
    return max(steered.cost, MAX_COST), -steered.echoes, -steered.lift


def steer(session: Session, latent: int, words: frozenset[str]) -> Steered:
    """Continue the prompts at several strengths; the plainest effect among readable texts, else the most readable text."""
    sampling = Sampling(max_new_tokens=28, temperature=0.7, seed=3, repetition_penalty=1.15)
    lengths = [len(session.tokenizer.encode_prompt(prompt)) for prompt in PROMPTS]
    baseline = complete(session.model, session.tokenizer, list(PROMPTS), sampling)
    natural = [_judge(session, prompt, text, latent) for prompt, text in zip(PROMPTS, baseline, strict=True)]
    known = session.needs_features()
    tried: list[Steered] = []
    for strength in STRENGTHS:
        recipe = Recipe((Edit(latent=latent, strength=strength),), known.sae.weights_hash)
        hooks = known.steering.hooks_for([recipe] * len(PROMPTS), lengths)
        texts = complete(session.model, session.tokenizer, list(PROMPTS), sampling, hooks_for=hooks)
        for prompt, plain, text, (level, cost) in zip(PROMPTS, baseline, texts, natural, strict=True):
            steered_level, steered_cost = _judge(session, prompt, text, latent)
            echoes = len(_found(text, words)) - len(_found(plain, words))
            tried.append(Steered(prompt, strength, plain, text, steered_level - level, echoes, steered_cost - cost))
    return min(tried, key=_unfit)


@torch.no_grad()
def _judge(session: Session, prompt: str, text: str, latent: int) -> tuple[float, float]:
    """What the unsteered model reads in `text` behind `prompt`: the latent's mean in multiples of its maximum, and the loss in
    nats per token."""
    start = len(session.tokenizer.encode_prompt(prompt))
    ids = session.tokenizer.encode_prompt(prompt + text)
    if len(ids) <= start:
        return 0.0, math.inf
    values = session.read(ids).of(latent)[start:]
    tokens = torch.tensor([ids], device=session.model.device)
    losses = torch.nn.functional.cross_entropy(session.model(tokens)[0, :-1].float(), tokens[0, 1:], reduction="none")
    maximum = float(session.needs_features().max_values[latent])
    return math.fsum(values) / len(values) / maximum, float(losses[start - 1 :].mean())


def highlighted(sentence: TopSentence) -> str:
    """The sentence with the tokens on which the latent reaches a third of its value set apart: in colour, or as «token»."""
    peak = max(sentence.activations)
    out = ""
    for token, value in zip(map(printable, sentence.tokens), sentence.activations, strict=True):
        if value < peak / 3 or value <= 0:
            out += token
        else:
            lead = token[: len(token) - len(token.lstrip())]
            out += lead + _apart(token.lstrip(), 222 if value < 0.7 * peak else 214)
    return out.replace("\n", " ").replace("»«", "")


def _found(text: str, words: frozenset[str]) -> set[str]:
    return {found.casefold() for found in WORD.findall(text)} & words


def _marked(text: str, words: frozenset[str]) -> str:
    """On one line, with `words` set apart."""
    return WORD.sub(
        lambda found: _apart(found[0]) if found[0].casefold() in words else found[0], printable(" ".join(text.split()))
    )


def _apart(text: str, background: int = 214) -> str:
    return f"\x1b[30;48;5;{background}m{text}\x1b[0m" if sys.stdout.isatty() else f"«{text}»"

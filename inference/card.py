"""All that is known about one feature, as the app and the notebook show it."""

from collections.abc import Sequence
from dataclasses import dataclass

from inference.finding import Hit, hit, similar
from inference.session import Feature, Features
from interpretability.records import Explanation, LatentStatistics, TopSentence, trust

N_SENTENCES = 12
N_STORED = 40
"""Sentences among which different texts are looked for."""


@dataclass(frozen=True)
class Card:
    """One feature: what it is called, how it behaves on the corpus, and which features resemble it."""

    feature: Feature
    label: str
    """Empty where it has none."""
    explanation: Explanation | None
    statistics: LatentStatistics
    sentences: tuple[TopSentence, ...]
    """Those in which it fires most, each text once."""
    neighbours: tuple[Hit, ...]
    """Features that write in a similar direction."""
    coactive: tuple[Hit, ...]
    """Features that fire on the same tokens, with the Jaccard index."""
    best_strength: float | None
    """As measured by `inference.steering_eval`, in multiples of its maximum."""

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """How often and how strongly it fires, as names and values to show."""
        statistics = self.statistics
        return (
            ("fires on", f"{_share(statistics.density)} of tokens"),
            ("maximum", f"{statistics.max:.3g}"),
            ("mean", f"{statistics.mean:.3g}"),
            ("sentences", f"{statistics.sentence_count:,}"),
        )

    @property
    def source(self) -> str:
        """How far its explanation can be trusted and who wrote it; empty without one."""
        explanation = self.explanation
        if explanation is None or explanation.state != "valid":
            return ""
        trusted = trust(explanation)
        measured = "score" if explanation.score is not None else "certainty"
        by = [f"{measured} {trusted:.2f}"] if trusted else []
        by += [explanation.method.replace("_", " "), *([explanation.model] if explanation.model else [])]
        return " · ".join(by)


def card_of(features: Features, latent: int) -> Card:
    """The card of one latent. ValueError where there is no such latent."""
    statistics = features.top.statistics(latent)
    return Card(
        feature=Feature(features.site, latent),
        label=features.label(latent),
        explanation=features.explanations.get(latent),
        statistics=statistics,
        sentences=tuple(distinct(features.top.sentences(latent, n=N_STORED))),
        neighbours=tuple(similar(features, latent)),
        coactive=tuple(hit(features, one["latent"], one["jaccard"]) for one in statistics.cofiring),
        best_strength=features.best_strengths.get(latent),
    )


def _share(density: float) -> str:
    if density <= 0:
        return "none"
    return f"{density:.1%}" if density >= 0.001 else f"1 in {round(1 / density):,}"


def distinct(sentences: Sequence[TopSentence]) -> list[TopSentence]:
    """The first N_SENTENCES of different text: documentation repeats itself."""
    found: dict[str, TopSentence] = {}
    for sentence in sentences:
        found.setdefault(sentence.text, sentence)
    return list(found.values())[:N_SENTENCES]

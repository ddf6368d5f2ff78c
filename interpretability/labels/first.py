"""Which features are shown first: the one rule of the app, the report, the map, the demo, and steering's measurements.

    worth = variety * clarity * readability * effect, each from 0 to 1

variety      share of different words among the peaks of a latent's sentences (`evidence.peaks`): at 0 it names a single word,
             however well its label scores; near 1 it stands for a concept, if its label still tells where it fires
clarity      how far its label does: twice its balanced accuracy over chance, `2 * trust - 1`, not below 0
readability  1 for a label that says a meaning: written by a reader or a language model, a category, or whole words that all
             carry meaning; PLAIN for one of grammar, pieces of words and signs
effect       where steering was measured: 1 for the feature that steers most, down to 1 / n for the n-th, 0 for all that were
             not measured or not found to steer; 1 for all where nothing was measured

Of several features on one subject the second counts for half of its worth, the third for a third. Features of equal worth, such
as single words at 0, go by variety, then by latent.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from interpretability.labels.words import is_content, names_content, quoted_words, units_of
from interpretability.records import Explanation, trust

PLAIN = 0.25
"""Readability of a label that names no meaning."""
COUNTED = "token_statistics"


def shown_first(
    explanations: Mapping[int, Explanation], variety: npt.NDArray[np.float32], steering: Sequence[int] = ()
) -> list[int]:
    """All latents with a valid explanation, in the order in which they are shown.

    `variety` (n_latents,) is `TopSentences.peak_variety`; `steering` are latents that were found to steer, the strongest first.
    """
    known = [latent for latent, found in explanations.items() if found.state == "valid" and found.title.strip()]
    effect = {latent: 1 - place / len(steering) for place, latent in enumerate(steering)}
    worth = {
        latent: float(variety[latent]) * _clarity(explanations[latent]) * _readability(explanations[latent])
        * (effect.get(latent, 0.0) if effect else 1.0)
        for latent in known
    }  # fmt: skip
    seen: Counter[str] = Counter()
    for latent in sorted(known, key=lambda latent: (-worth[latent], latent)):
        seen[subject(explanations[latent])] += 1
        worth[latent] /= seen[subject(explanations[latent])]
    return sorted(known, key=lambda latent: (-worth[latent], -float(variety[latent]), latent))


def readable(explanation: Explanation) -> bool:
    """Whether a label says a meaning, and not only a form of words or a sign."""
    title, category = explanation.title, explanation.details.get("category")
    if explanation.method != COUNTED or (category and title.startswith(f"{category['name']}:")):
        return True
    return title.startswith("text about ") or (names_content(title) and not title.startswith("mixed:") and _whole(explanation))


def subject(explanation: Explanation) -> str:
    """What a label is about, for telling two features on one subject: the first word that it quotes or says."""
    title = explanation.title.casefold()
    head = title.removeprefix("text about ").partition(":")[0]
    words = quoted_words(head) or [word for word in units_of(head).folded if is_content(word)]
    return words[0] if words else title


def _whole(explanation: Explanation) -> bool:
    """Whether at least half of the words that a label quotes are tokens on which the latent fires, and not longer than these,
    such as the "Lu" of `"Lucena", "lucidum"`; true where the tokens are not known."""
    tokens = {str(token["token"]).strip().casefold() for token in explanation.details.get("tokens", ())}
    words = [word.casefold() for word in quoted_words(explanation.title)]
    return not tokens or 2 * sum(word in tokens for word in words) >= len(words)


def _clarity(explanation: Explanation) -> float:
    return max(0.0, 2 * trust(explanation) - 1)


def _readability(explanation: Explanation) -> float:
    return 1.0 if readable(explanation) else PLAIN

"""What the latents of an SAE mean: top sentences, explanations, scores, search, reports."""

# isort: off
import core.ending  # before everything else: signals during the imports of a stage  # noqa: F401
# isort: on

from typing import TYPE_CHECKING

from core import lazy_exports

__all__ = [
    "Explanation",
    "LatentStatistics",
    "TopSentence",
    "TopSentences",
    "neighbours",
    "open_top",
    "read_explanations",
    "search_prompts",
    "search_text",
]

if TYPE_CHECKING:
    from interpretability.records import Explanation, LatentStatistics, TopSentence, TopSentences, open_top, read_explanations
    from interpretability.search import neighbours, search_prompts, search_text
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "interpretability.records": (
                "Explanation",
                "LatentStatistics",
                "TopSentence",
                "TopSentences",
                "open_top",
                "read_explanations",
            ),
            "interpretability.search": ("neighbours", "search_prompts", "search_text"),
        },
    )

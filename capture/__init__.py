"""Text to sentences, sentences to activations on disk, and the readers of both."""

# isort: off
import core.ending  # before everything else: signals during the imports of a stage  # noqa: F401
# isort: on

from typing import TYPE_CHECKING

from core import lazy_exports

__all__ = ["Activations", "Chunk", "Corpus", "open_activations", "open_corpus"]

if TYPE_CHECKING:
    from capture.store import Activations, Chunk, Corpus, open_activations, open_corpus
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "capture.store": ("Activations", "Chunk", "Corpus", "open_activations", "open_corpus"),
        },
    )

"""Completion and chat with a model, steered or not, and watching what its latents do."""

# isort: off
import core.ending  # before everything else: signals during the imports of a stage  # noqa: F401
# isort: on

from typing import TYPE_CHECKING

from core import lazy_exports

__all__ = ["Edit", "Feature", "Features", "InferenceConfig", "Recipe", "Session", "Steering", "Watch", "open_session"]

if TYPE_CHECKING:
    from inference.session import Feature, Features, InferenceConfig, Session, open_session
    from inference.steering import Edit, Recipe, Steering
    from inference.watch import Watch
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "inference.session": ("Feature", "Features", "InferenceConfig", "Session", "open_session"),
            "inference.steering": ("Edit", "Recipe", "Steering"),
            "inference.watch": ("Watch",),
        },
    )

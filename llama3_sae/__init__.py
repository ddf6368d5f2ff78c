"""The face for Python: load a model with its SAE, read and find features, and steer with them.

import llama3_sae as ls

s = ls.open("demo")
s.features("The ship left the harbour before the storm.")
"""

from typing import TYPE_CHECKING

from core import lazy_exports

__all__ = ["Feature", "Recipe", "Session", "Steered", "load_sae", "open"]

if TYPE_CHECKING:
    from inference.session import Feature
    from inference.steering import Recipe
    from llama3_sae.saes import load_sae
    from llama3_sae.session import Session, Steered, open
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "inference.session": ("Feature",),
            "inference.steering": ("Recipe",),
            "llama3_sae.saes": ("load_sae",),
            "llama3_sae.session": ("Session", "Steered", "open"),
        },
    )

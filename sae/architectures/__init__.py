"""The architectures of SAEs, a module each, whose `ARCHITECTURE` is a subclass of `sae.model.SAE`.

What depends on the architecture is asked of that class; elsewhere only its name is known. The names
are those of the modules here, and a module is imported when its architecture is used, so this file
needs no torch. A folder appended to `__path__` adds architectures of one's own: docs/extending.md.
"""

import importlib
import pkgutil
from typing import Any


def names() -> tuple[str, ...]:
    """The architectures that can be named, in order of the alphabet. Modules with a leading
    underscore are what they share.
    """
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def architecture(name: str) -> Any:
    """The class of an architecture, a `type[sae.model.SAE]`. ValueError where there is none of this
    name.
    """
    if name not in names():
        raise ValueError(f"architecture {name!r} is not known; expected one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").ARCHITECTURE

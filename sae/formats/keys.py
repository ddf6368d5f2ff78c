"""The configuration file of another library, read so that no key is passed over in silence.

A reader asks for each key by name. What it did not ask for is either refused (`refuse_others`) or
left out on purpose, where the library itself leaves it out. A missing key is an error unless the
reader gives the value that the library's own loader takes then.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sae.formats.weights import named

T = TypeVar("T")
MISSING: Any = object()
NONE: Mapping[str, str] = {}
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "an object", list: "a list"}


class Keys:
    """The keys of one JSON object; `where` names it in messages."""

    def __init__(self, where: Path | str, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, dict(values)
        self._asked: set[str] = set()

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """ValueError where the file is not a JSON object."""
        return cls(path, read_json(path))

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def need(self, name: str, kind: type[T]) -> T:
        """The value of a key without which nothing can be read. ValueError where it is missing or no `kind`."""
        value: T = self.get(name, kind, MISSING)
        return value

    def get(self, name: str, kind: type[T], default: T) -> T:
        """The value of a key; `default` where it is missing, which must be what the library's own loader takes."""
        self._asked.add(name)
        if name not in self.values:
            if default is MISSING:
                raise ValueError(f"{self.where}: {name} is missing, and without it what the SAE computes is not known")
            return default
        value: Any = self.values[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: {name} is {value!r}; expected {NAMES[kind]}")
        return value

    def positive(self, name: str) -> float:
        """A number to multiply or divide by. ValueError where it is missing, not above 0, or not finite."""
        value = self.need(name, float)
        if not 0 < value < math.inf:
            raise ValueError(f"{self.where}: {name} is {value!r}; expected a number above 0")
        return value

    def one_of(self, name: str, *accepted: Any, default: Any = MISSING, refused: Mapping[str, str] = NONE) -> Any:
        """The value of a key that may have only some: the others change what is computed.
        ValueError names what was found, and why it cannot be met where `refused` says so.
        """
        self._asked.add(name)
        value = self.values.get(name, default)
        if value is MISSING:
            raise ValueError(f"{self.where}: {name} is missing; expected {_listed(accepted)}")
        if isinstance(value, str) and value in refused:
            raise ValueError(f"{self.where}: {name} is {value!r}, which cannot be computed here: {refused[value]}")
        if not any(type(value) is type(one) and value == one for one in accepted):
            raise ValueError(f"{self.where}: {name} is {value!r}, which cannot be computed here; expected {_listed(accepted)}")
        return value

    def object(self, name: str) -> "Keys":
        """The keys of the object at `name`; none where it is missing or null."""
        self._asked.add(name)
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{self.where}: {name} is {value!r}; expected {NAMES[dict]}")
        return Keys(f"{self.where}: {name}", value or {})

    def note(self, name: str) -> Any:
        """A value that changes nothing that is computed, as it stands; None where it is missing."""
        self._asked.add(name)
        return self.values.get(name)

    def skip(self, *names: str) -> None:
        """Keys that do not change what is computed."""
        self._asked.update(names)

    def refuse_others(self) -> None:
        """ValueError naming a key that was not asked for."""
        if others := sorted(set(self.values) - self._asked):
            name = others[0]
            raise ValueError(
                f"{self.where}: {name} ({self.values[name]!r}) is not known and may change what the SAE computes; "
                "remove the key if it does not"
            )


def read_json(path: Path) -> dict[str, Any]:
    """ValueError where the file is not a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON object ({named(error)})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object ({type(values).__name__})")
    return values


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(json.dumps(value) for value in values)

"""Text from outside: UTF-8, where one leading byte order mark is no part of the text and a line is what ends in `\\n`.

Whatever a user hands over as text or JSON is read through here. (Documents of a corpus come in other encodings too:
`capture.sources`.)
"""

import json
import tomllib
from pathlib import Path
from typing import Any

MARK = "\ufeff"
"""The byte order mark, which some editors put first."""
MOST_DOTS = 2000  # in a line of TOML


def decode(data: bytes, what: str) -> str:
    """`data` as text, without a byte order mark. ValueError naming `what` and the byte where it is not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text (byte {error.start:,}); convert it first") from None


def read_text(path: Path, what: str = "") -> str:
    """What a file holds, as text; `what` is how messages call it, else its path. OSError where it cannot be read."""
    return decode(path.read_bytes(), what or str(path))


def lines(text: str) -> list[str]:
    """The lines of `text` without their ends, `\\n` or `\\r\\n`.

    Unlike `str.splitlines`, form feeds, U+2028 and their like are characters as any other.
    """
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The value of a JSON text. ValueError where it is none, or nested more deeply than Python can follow."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """ValueError where `text` is no TOML, or nested more deeply than any preset."""
    deep = max(line.count(".") for line in text.split("\n")) > MOST_DOTS  # tomllib's memory is quadratic in a.b.c.d
    try:
        if not deep:
            return tomllib.loads(text)
    except RecursionError:
        pass
    raise ValueError("it is nested too deeply")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. ValueError naming the file where it is none."""
    try:
        data = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(data).__name__}")
    return data

"""One HTML file from its parts: assets of this package and data, without anything from a network.

Nothing of the data can leave its place: inside JSON no `<` is left, and the scripts write text, never markup.
"""

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def asset(name: str) -> str:
    """A file of `assets/`."""
    return resources.files("interpretability.pages").joinpath("assets", name).read_text(encoding="utf-8")


def json_text(value: Any) -> str:
    """JSON that is safe inside a script element, and is JavaScript too. ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(UNSAFE)


def render(
    template: str, title: str, data: Any, styles: Sequence[str], scripts: Sequence[str], files: Mapping[str, str] | None = None
) -> str:
    """The page: `template` with its data, styles and scripts (names of assets), and `files` (JSON by name) inside it."""
    inside = [f'<script type="application/json" data-file="{name}">{text}</script>\n' for name, text in (files or {}).items()]
    parts = {
        "title": html.escape(title),
        "style": "".join(map(asset, styles)),
        "data": json_text(data),
        "files": "".join(inside),
        "script": "".join(map(asset, scripts)),
    }
    pieces = asset(template).split("{{")
    page = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        page += [parts[name], rest]
    return "".join(page)

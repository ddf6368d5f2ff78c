"""Text for a terminal: what a corpus, a model, a server or a file name says must not steer it.

A terminal obeys control characters: ESC begins sequences that clear the screen, set the title or fill the clipboard (OSC 52),
a carriage return overwrites a line, and U+009B is ESC [ in one character. They are shown as escapes, such as `\\x1b`.
"""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""C0 without tab and line break, DEL, and C1."""


def printable(text: str) -> str:
    """`text` with its control characters as escapes; tabs and line breaks stay."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def say(text: str) -> None:
    """Print lines on standard output."""
    print(printable(text), flush=True)


def json_line(record: Mapping[str, Any]) -> str:
    """One line of JSON that reads back as `record`, without a control character in it."""
    text = json.dumps(record, ensure_ascii=False)  # escapes C0
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class PrintableFormatter(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

"""Tables of plain text: a column per key, text to the left and numbers to the right."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from core.terminal import printable


def text_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a table with a column for each key of the first row; none without rows. None is an empty cell."""
    if not rows:
        return
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    textual = [any(isinstance(row[key], str) for row in rows) for key in rows[0]]
    for line in cells:
        padded = (
            cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(line, widths, textual, strict=True)
        )
        yield "  ".join(padded).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return " ".join(map(_cell, value)) if isinstance(value, tuple) else printable(" ".join(str(value).split()))

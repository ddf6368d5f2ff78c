"""What several runs came to: one table, and one page with their curves."""

import html
import io
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from core import files
from core.lines import read_lines
from sae.metrics import ADVICE

CURVES = ("fvu", "val_fvu", "l0", "dead_fraction")
MEASURED = ("step", "tokens", "fvu", "val_fvu", "l0", "dead_fraction")


def write_results(out: Path, runs: Sequence[Any]) -> str:
    """Write `results.md`, `results.json` and `training.html` into `out`; returns the table."""
    lines = {run.out.name: read_lines(run.out / "metrics.jsonl", ADVICE).records for run in runs}
    differing = _differing(runs)
    records = [
        {"run": run.out.name}
        | {name: getattr(run, name) for name in differing}
        | {name: _last(lines[run.out.name], name) for name in MEASURED}
        for run in runs
    ]
    table = _markdown(records)
    files.replace(out / "results.md", table.encode())
    files.replace(out / "results.json", (json.dumps(records, indent=1) + "\n").encode())
    files.replace(out / "training.html", _page(lines, table).encode())
    return table


def _differing(runs: Sequence[Any]) -> list[str]:
    """Flags that are not the same in all runs, but for the folder."""
    names = [item.name for item in fields(runs[0]) if item.name != "out"]
    return [name for name in names if len({getattr(run, name) for run in runs}) > 1]


def _last(lines: list[dict[str, Any]], name: str) -> Any:
    """The newest value; None where a run has none."""
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)


def _markdown(records: list[dict[str, Any]]) -> str:
    rows = [list(records[0]), ["---"] * len(records[0])]
    rows += [[_shown(value) for value in record.values()] for record in records]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _page(lines: dict[str, list[dict[str, Any]]], table: str) -> str:
    """The table, and a picture of each measure over the rows seen; one file, without a server."""
    head, _, *rows = ([cell.strip() for cell in row[1:-1].split("|")] for row in table.splitlines())
    cells = "".join(f"<th>{html.escape(cell)}" for cell in head)
    for row in rows:
        cells += "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row)
    pictures = "".join(f"<h2>{name}</h2>{_picture(lines, name)}" for name in CURVES)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Training</title><style>'
        "body{font:15px system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}"
        "td,th{border-bottom:1px solid #ccc;padding:.25rem .7rem;text-align:right}"
        "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}</style>"
        f"<h1>Training</h1><table><tr>{cells}</table>{pictures}</html>\n"
    )


def _picture(lines: dict[str, list[dict[str, Any]]], name: str) -> str:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for run, records in lines.items():
        points = [(line["tokens"], line[name]) for line in records if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) == 1 else "", label=run)
    axes.set_xlabel("rows seen")
    axes.set_ylabel(name)
    if axes.lines and len(lines) <= 20:
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode()
    return text[text.index("<svg") :]

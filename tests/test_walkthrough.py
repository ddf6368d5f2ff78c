"""The notebook: it runs, its outputs are what running it gives, and it opens with what a newcomer wants."""

import ast
import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from docs.notebook import run_cell, run_notebook

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def sources(some: list[dict[str, Any]]) -> Iterator[str]:
    return ("".join(cell["source"]) for cell in some if cell["cell_type"] == "code")


def kinds(outputs: list[dict[str, Any]]) -> list[Any]:
    """What the outputs are, without their numbers, which differ in the last digit between processors."""
    return [(output["output_type"], sorted(output.get("data", ()))) for output in outputs]


def test_every_cell_of_the_notebook_runs() -> None:
    names: dict[str, Any] = {}
    for cell in cells():
        if cell["cell_type"] == "code":
            outputs = run_cell("".join(cell["source"]), names)
            assert outputs
            assert kinds(outputs) == kinds(cell["outputs"]), "store it again: python -m docs.notebook docs/walkthrough.ipynb"


def test_it_opens_with_features_found_and_steered_in_few_statements() -> None:
    """Load, look at the features of a sentence, find one by words, steer with it: one import, at most 8 statements."""
    opening = list(takewhile(lambda cell: not "".join(cell["source"]).startswith("## "), cells()))
    statements = [statement for source in sources(opening) for statement in ast.parse(source).body]
    imports = [statement for statement in statements if isinstance(statement, ast.Import | ast.ImportFrom)]
    assert len(imports) == 1
    assert len(statements) - 1 <= 8
    names: dict[str, Any] = {}
    shown = [output for source in sources(opening) for output in run_cell(source, names)]
    features, hits, card, completion = ("".join(output["data"]["text/plain"]) for output in shown)
    session, found = names["s"], names["found"]
    latent = found[0].latent
    assert {"ship", "storm"} <= set(features.split())
    assert "sixty" in found[0].label
    assert found[0].label in hits
    assert card.startswith(f"latent {latent} at {session.sae.site}")
    text = session.steer({latent: 1.5}).complete("This morning I", seed=3, max_new_tokens=30).text
    assert repr(text) in completion
    assert text != session.complete("This morning I", seed=3, max_new_tokens=30).text


def test_a_cell_shows_its_prints_and_its_last_expression() -> None:
    names: dict[str, Any] = {}
    assert run_cell("x = 2\nprint(x)", names) == [{"name": "stdout", "output_type": "stream", "text": ["2\n"]}]
    (shown,) = run_cell("x + 1", names)
    assert shown["data"] == {"text/plain": ["3"]}
    assert run_cell("None", names) == run_cell("y = 1", names) == []


def test_a_notebook_is_stored_with_its_outputs(tmp_path: Path) -> None:
    path = tmp_path / "small.ipynb"
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": ["1 + 1"]}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}))
    run_notebook(path)
    (output,) = json.loads(path.read_text())["cells"][0]["outputs"]
    assert output["data"]["text/plain"] == ["2"]

"""The console script, its table of stages, and packages that load a module only when one of its names is used."""

import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from core.version import VERSION
from llama3_sae import commands
from llama3_sae.commands import find, listing
from llama3_sae.stages import STAGES
from tests.conftest import Launch

ROOT = Path(__file__).parent.parent
LAZY = ("capture", "sae", "interpretability", "inference", "llama3_sae")
HEAVY = ("torch", "numpy", "pyarrow", "tyro", "gradio", "llama3", "sae.model")


def test_the_table_holds_every_stage() -> None:
    """A stage is a module that ends in `run_stage`; besides, there are the ways to and from the Hub, and the demo."""
    found = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for package in ("capture", "sae", "interpretability", "inference")
        for path in (ROOT / package).rglob("*.py")
        if "    run_stage(" in path.read_text(encoding="utf-8")
    }
    assert {stage.module for stage in STAGES} == found | {"demo", "sae.push", "sae.pull"}
    assert find_spec("demo.__main__") is not None
    lines = listing().splitlines()
    for stage in STAGES:
        assert [line for line in lines if line.split()[:1] == [stage.name] and stage.does in line]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("train", "sae.train"),
        ("sae.train", "sae.train"),
        ("top-sentences", "interpretability.top_sentences"),
        ("steering_eval", "inference.steering_eval"),
        ("demo", "demo"),
    ],
)
def test_a_stage_goes_by_its_name(name: str, module: str) -> None:
    assert find(name).module == module


def test_unknown_and_ambiguous_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'trian'.*train"):
        find("trian")
    twice = (*STAGES, STAGES[4]._replace(module="inference.train"))
    monkeypatch.setattr(commands, "STAGES", twice)
    with pytest.raises(ValueError, match=r"sae\.train or inference\.train"):
        find("train")


def test_the_script_lists_and_runs_stages(launch: Launch, tmp_path: Path) -> None:
    assert launch("-m", "llama3_sae").stdout == launch("-m", "llama3_sae", "--help").stdout == listing()
    assert VERSION in launch("-m", "llama3_sae", "--version").stdout
    unknown = launch("-m", "llama3_sae", "trian")
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1
    (tmp_path / "text.txt").write_text("The sea was calm. The ship left the harbour.")
    flags = ("--source", tmp_path / "text.txt")
    ran = launch("-m", "llama3_sae", "sentences", *flags, "--out", tmp_path / "a")
    assert ran.returncode == 0, ran.stderr
    assert launch("-m", "capture.sentences", *flags, "--out", tmp_path / "b").returncode == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir() if path.suffix != ".txt")
    assert "manifest.json" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    refused = launch("-m", "llama3_sae", "sentences", "--sourse", "x")
    assert refused.returncode == 2
    assert "--sourse" in refused.stderr


def test_the_script_is_the_one_that_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["llama3-sae"].partition(":")
    assert getattr(import_module(module), name) is commands.main


@pytest.mark.parametrize("code", [f"import {', '.join(LAZY)}", "import llama3_sae.commands as c; c.listing()"])
def test_importing_a_package_and_listing_stages_load_nothing_heavy(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(HEAVY) & set(done.stdout.split())


@pytest.mark.parametrize("package", LAZY)
def test_every_exported_name_is_there(package: str) -> None:
    module = import_module(package)
    assert dir(module) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__module__.split(".")[0] == package or package == "llama3_sae"
        assert find_spec(f"{package}.{name}") is None, "a module of that name would hide it once it is imported"
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


@pytest.mark.parametrize("package", LAZY)
def test_types_see_what_is_exported(package: str) -> None:
    """The imports that type checkers read are those that are made."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "core")
        for alias in node.names
    }
    module = import_module(package)
    assert set(seen) == set(module.__all__)
    for name, source in seen.items():
        assert source is not None
        assert getattr(module, name) is getattr(import_module(source), name)

"""The walls of the house: who may import whom, who reads ranks, and that nothing is ever pickled."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("core", "llama3", "capture", "sae", "interpretability", "inference", "llama3_sae", "demo", "scripts")

ALLOWED = {
    "core": (),
    "llama3": ("core",),
    "capture": ("core", "llama3"),
    "sae": ("core", "capture.store"),
    "interpretability": ("core", "llama3", "capture.store", "capture.batches", "capture.chunks", "sae"),
    "inference": (
        *("core", "llama3", "sae"),
        *(f"interpretability.{name}" for name in ("records", "opening", "search", "causal.records")),
    ),
    "llama3_sae": ("core", "llama3", "capture", "sae", "interpretability", "inference"),
    "demo": ("core", "llama3", "capture", "sae", "interpretability", "inference", "llama3_sae"),
    "scripts": PACKAGES,
}
"""The table of DESIGN.md, section 1: beside itself, a package imports these modules and what lies below them."""
ABOVE = ("llama3_sae", "demo", "scripts")
"""Packages on top of the stages: they may import one."""
ALSO = {"sae/evaluate.py": ("llama3",)}

RANK_NAMES = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
RANK_CALLS = {"get_rank", "get_world_size", "get_local_rank", "get_node_local_rank"}
NEWLINE = b"\n"
PICKLES = {"cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FOREIGN_PICKLE = "sae/formats/dictionary_learning.py"
"""The one writer of a pickle, by that library's choice (docs/decisions.md)."""
FOREIGN_PICKLES = "sae/formats/"
"""Where the pickles of other libraries are read, as tensors alone."""


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that is imported anywhere in `tree`, within functions and by string too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if is_module(full) else base
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__", "importlib.import_module"}:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def violations(path: str, text: str) -> list[str]:
    """Imports of `text`, lying at `path`, that the table forbids."""
    package = path.split("/", maxsplit=1)[0]
    is_package = path.endswith("/__init__.py")
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    allowed = (package, *ALLOWED[package], *ALSO.get(path, ()))
    wrong = []
    for line, name in imported(ast.parse(text), module, is_package):
        ours = name.split(".")[0] in (*PACKAGES, "tests", "benchmarks")
        if ours and not any(name == permitted or name.startswith(permitted + ".") for permitted in allowed):
            wrong.append(f"{path}:{line} imports {name}; {package} may import {', '.join(allowed)}")
        elif package not in ABOVE and name.split(".")[0] != package and name not in allowed and is_stage(name):
            wrong.append(f"{path}:{line} imports {name}, a stage of another package; stages meet on the disk")
    return wrong


def is_stage(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path.is_file() and "run_stage(" in path.read_text(encoding="utf-8") and name != "core.cli"


def test_imports_follow_the_table() -> None:
    wrong = []
    for path in sources(*PACKAGES):
        wrong += violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "text", "n"),
    [
        ("core/x.py", "import llama3", 1),
        ("core/x.py", "import torch, json", 0),
        ("llama3/x.py", "from core.cli import parse\nfrom . import rope\nfrom .rope import y", 0),
        ("llama3/x.py", "from sae.model import SAE", 1),
        ("sae/x.py", "from capture.store import open_activations", 0),
        ("sae/x.py", "from capture import store", 0),
        ("sae/x.py", "from capture import sentences", 1),
        ("sae/x.py", "import capture", 1),
        ("sae/x.py", "import llama3", 1),
        ("sae/evaluate.py", "import llama3", 0),
        ("interpretability/x.py", "def f():\n    from sae.train import run", 1),
        ("interpretability/x.py", "import sae.model\nimport sae.kernels", 0),
        ("inference/x.py", "from interpretability.records import Explanation", 0),
        ("inference/x.py", "from interpretability import report", 1),
        ("inference/x.py", "from interpretability.search import search_text", 0),
        ("inference/x.py", "from ..demo import corpus", 1),
        ("capture/x.py", "import importlib\nimportlib.import_module('demo.corpus')", 1),
        ("inference/x.py", "import llama3_sae", 1),
        ("llama3_sae/x.py", "import inference.app\nimport sae.convert", 0),
        ("llama3_sae/x.py", "import demo.corpus", 1),
        ("demo/x.py", "import inference.app", 0),
        ("demo/x.py", "import tests.tiny", 1),
        ("core/__init__.py", "from .files import publish\nfrom core import cli", 0),
    ],
)
def test_the_walk_sees_what_it_should(path: str, text: str, n: int) -> None:
    assert len(violations(path, text)) == n


def test_ranks_are_read_in_one_place() -> None:
    wrong = []
    for path in sources(*PACKAGES):
        if path == ROOT / "core" / "runtime.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in RANK_NAMES:
                wrong.append(f"{path}:{node.lineno} names {node.value}")
            if isinstance(node, ast.Attribute) and node.attr in RANK_CALLS:
                wrong.append(f"{path}:{node.lineno} calls {node.attr}")
    assert not wrong, "\n".join(wrong)


def pickles(path: str, text: str) -> list[str]:
    """Places in `text`, lying at `path`, that write a pickle, or read one otherwise than llama3 and sae/formats may."""
    wrong = []
    for node in ast.walk(ast.parse(text)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in PICKLES for alias in node.names):
            wrong.append(f"{where} imports a pickler")
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name for alias in node.names}
            if node.module in PICKLES or (node.module == "pickle" and names != {"UnpicklingError"}):
                wrong.append(f"{where} imports a pickler")
            if node.module == "torch" and names & {"save", "load"}:
                wrong.append(f"{where} hides torch.save or torch.load behind a name of its own")
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
            wrong.append(f"{where} uses pickle.{node.attr}")
        elif isinstance(node, ast.Call):
            name, flags = called(node), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.save" and path != FOREIGN_PICKLE:
                wrong.append(f"{where} writes a pickle")
            may_load = path.startswith(("llama3/", FOREIGN_PICKLES))
            if name == "torch.load" and (not may_load or flags.get("weights_only") != "True"):
                wrong.append(f"{where} loads a pickle; only llama3 and sae/formats may, with weights_only=True")
            if flags.get("allow_pickle", "False") != "False":
                wrong.append(f"{where} allows pickles")
    return wrong


def test_nothing_is_pickled_and_torch_load_is_safe() -> None:
    """Tests and benchmarks may write one, to see that it is read as Meta's checkpoints are, or refused."""
    wrong = []
    for path in sources(*PACKAGES):
        wrong += pickles(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "text", "n"),
    [
        ("sae/x.py", "safetensors.torch.save(tensors)", 0),
        ("sae/x.py", "torch.save(tensors, path)", 1),
        ("sae/x.py", "from torch import save", 1),
        ("llama3/x.py", "torch.load(path, weights_only=True)", 0),
        ("llama3/x.py", "torch.load(path)", 1),
        ("llama3/x.py", "torch.load(path, weights_only=False)", 1),
        ("sae/x.py", "torch.load(path, weights_only=True)", 1),
        (FOREIGN_PICKLE, "torch.load(path, weights_only=True)\ntorch.save(tensors, path)", 0),
        (FOREIGN_PICKLE, "torch.load(path)", 1),
        (FOREIGN_PICKLES + "x.py", "torch.load(path, weights_only=True)", 0),
        (FOREIGN_PICKLES + "x.py", "torch.load(path)", 1),
        (FOREIGN_PICKLES + "x.py", "torch.save(tensors, path)", 1),
        ("sae/x.py", "import pickle\npickle.dumps(x)", 1),
        ("llama3/x.py", "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    g()", 0),
        ("sae/x.py", "import joblib", 1),
        ("sae/x.py", "np.load(path, allow_pickle=True)", 1),
    ],
)
def test_the_search_for_pickles_finds_what_it_should(path: str, text: str, n: int) -> None:
    assert len(pickles(path, text)) == n


def repository_files() -> Iterator[Path]:
    """Everything in the repository, without environments, caches and what stages wrote."""
    shown = (".ci", ".github", ".gitignore", ".pre-commit-config.yaml")
    for top in sorted(ROOT.iterdir()):
        if (top.name.startswith(".") and top.name not in shown) or top.name in ("runs", "wandb", "build", "dist", "outputs"):
            continue
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    somebody = re.compile(rb"(?<![\w.~*])/(?:root|home|Users)/[\w.]")
    wrong = []
    for path in repository_files():
        content = path.read_bytes()
        if found := somebody.search(content):
            wrong.append(f"{path.relative_to(ROOT)}:{content.count(NEWLINE, 0, found.start()) + 1} {found[0].decode()}")
    assert not wrong, "\n".join(wrong)

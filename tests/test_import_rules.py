"""The walls of the house: who may import whom, who reads ranks, and that nothing is ever pickled."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae import architectures

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
ABOVE_LLAMA3 = ("adopt.py", "adopting/", "card.py", "evaluate.py", "evaluating/", "formats/hub.py", "push.py")
ALSO: dict[str, tuple[str, ...]] = {f"sae/{name}": ("llama3",) for name in ABOVE_LLAMA3}
ALSO["sae/streaming/"] = ("llama3", "capture")
"""By the beginning of a path: what runs the model, or asks the Hub, may import more."""

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
    also = [name for start, names in ALSO.items() if path.startswith(start) for name in names]
    allowed = (package, *ALLOWED[package], *also)
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
        ("sae/streaming/x.py", "import llama3\nfrom capture.chunks import start_chunk", 0),
        ("sae/streaming/x.py", "from capture.activations import run", 1),
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


def import_graph(files: dict[str, str]) -> dict[str, set[str]]:
    """The modules that each one names in imports, wherever in its text they stand; `files` are texts by path."""
    graph = {}
    for path, text in files.items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        graph[module] = {name for _, name in imported(ast.parse(text), module, path.endswith("/__init__.py"))} - {module}
    return {module: names & graph.keys() for module, names in graph.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import one another, or stand on a way between two circles: what is left when leaves are taken off."""
    left = {module: set(names) for module, names in graph.items()}
    for reverse in (False, True):
        if reverse:
            left = {module: {other for other in left if module in left[other]} for module in left}
        while leaves := {module for module, names in left.items() if not names & left.keys()}:
            left = {module: names for module, names in left.items() if module not in leaves}
    return sorted(left)


def test_no_modules_import_one_another() -> None:
    """Within functions and under TYPE_CHECKING too. What a registry loads by a name that it is given is no import."""
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sources(*PACKAGES)}
    assert not circles(import_graph(files))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"core/cli.py": "import core.files", "core/files.py": "import core.cli"}, ["core.cli", "core.files"]),
        (
            {"core/cli.py": "def f():\n    from core.files import g", "core/files.py": "import core.cli"},
            ["core.cli", "core.files"],
        ),
        (
            {"core/cli.py": "if TYPE_CHECKING:\n    from core import files", "core/files.py": "from core.cli import parse"},
            ["core.cli", "core.files"],
        ),
        ({"core/cli.py": "import core.files", "core/files.py": "import torch", "core/runtime.py": "import core.cli"}, []),
        (
            {
                "core/cli.py": "import core.files",
                "core/files.py": "import core.runtime",
                "core/runtime.py": "import core.cli",
                "core/product.py": "import core.cli",
                "core/version.py": "",
            },
            ["core.cli", "core.files", "core.runtime"],
        ),
        ({"core/__init__.py": "from core.cli import parse", "core/cli.py": "import core.files", "core/files.py": ""}, []),
    ],
)
def test_the_search_for_circles_finds_what_it_should(files: dict[str, str], found: list[str]) -> None:
    assert circles(import_graph(files)) == found


FORMATS = "sae/formats/"
"""Where names of other libraries stand, some of which are ours too."""


def switches(path: str, text: str) -> list[str]:
    """Places in `text`, lying at `path`, that ask which architecture an SAE has: what depends on it belongs to its own file."""
    known = set(architectures.names())

    def named(node: ast.AST) -> bool:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return any(isinstance(part, ast.Constant) and part.value in known for part in parts)

    def only_names(nodes: list[ast.expr]) -> bool:
        return bool(nodes) and all(isinstance(node, ast.Constant) and node.value in known for node in nodes)

    wrong = []
    for node in ast.walk(ast.parse(text)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Compare) and any(map(named, [node.left, *node.comparators])):
            if not path.startswith(FORMATS) or "architecture" in ast.unparse(node):
                wrong.append(f"{where} compares with the name of an architecture")
        elif isinstance(node, ast.MatchValue) and named(node.value):
            wrong.append(f"{where} matches the name of an architecture")
        elif isinstance(node, ast.Dict) and only_names([key for key in node.keys if key is not None]):
            wrong.append(f"{where} is keyed by architectures")
        elif isinstance(node, ast.Tuple | ast.List | ast.Set) and len(node.elts) > 1 and only_names(node.elts):
            wrong.append(f"{where} lists architectures")
    module = path.removesuffix(".py").replace("/", ".")
    for line, name in imported(ast.parse(text), module, path.endswith("/__init__.py")):
        if name.startswith("sae.architectures."):
            wrong.append(f"{path}:{line} imports {name}")
    return wrong


def test_nothing_depends_on_the_architecture_outside_its_file() -> None:
    wrong = []
    for path in sources(*PACKAGES):
        if ROOT / "sae" / "architectures" not in path.parents:
            wrong += switches(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "text", "n"),
    [
        ("sae/x.py", "if cfg.architecture == 'topk': f()", 1),
        ("sae/x.py", "k = 1 if name in ('relu', 'jumprelu') else 2", 1 + 1),
        ("sae/x.py", "match name:\n    case 'gated': f()", 1),
        ("sae/x.py", "T = {'relu': 4, 'jumprelu': 6}", 1),
        ("sae/x.py", "T = Literal['topk', 'relu']", 1),
        ("inference/x.py", "from sae.architectures.topk import TopK", 1),
        ("sae/x.py", "from sae.architectures import architecture, names\nsae = make('topk')", 0),
        ("sae/x.py", "if sae.selects_top_k and a.architecture != b.architecture: f()", 0),
        ("sae/formats/x.py", "if kind == 'gated': f({'topk': 1, 'standard': 2})", 0),
        ("sae/formats/x.py", "if sae.cfg.architecture == 'gated': f({'topk': 1, 'relu': 2})", 2),
    ],
)
def test_the_search_for_switches_finds_what_it_should(path: str, text: str, n: int) -> None:
    assert len(switches(path, text)) == n


@pytest.mark.parametrize(
    ("modules", "most", "absent"),
    [
        ("sae.hyperparameters, sae.config, sae.architectures", 6, ("torch", "numpy")),
        ("sae.train", 45, ("llama3", "capture.chunks", "capture.activations", "sae.architectures.topk", "sae.plan")),
    ],
)
def test_little_is_loaded_before_it_is_used(modules: str, most: int, absent: tuple[str, ...]) -> None:
    """An architecture is imported when an SAE of its kind is made, and what names and flags need does without torch."""
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not {name for name in loaded if name in absent}
    assert len([name for name in loaded if name.split(".")[0] in PACKAGES]) <= most

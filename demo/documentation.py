"""Prose from the documentation that every installation carries: Python's topics and the docstrings of a few packages.

Sources are parsed with `ast`; nothing is imported or run. Doctests, signatures, tables, formulas and markup are dropped: what
remains are paragraphs of English, each document named after its module and object.
"""

import ast
import importlib.util
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

SKIPPED_FOLDERS = {
    "test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__",
    "ensurepip", "_vendor", "_inductor", "_dynamo", "onnx", "benchmarks", "caffe2", "_numpy", "fx", "_refs",
}  # fmt: skip
"""Tests, vendored code, and compiler internals whose docstrings are notes between developers."""
MIN_WORDS = 12


class Documentation(NamedTuple):
    """One documented object: `name` such as `numpy.linalg.norm`, and its prose, a paragraph a line."""

    name: str
    package: str
    text: str


def documentation(packages: tuple[str, ...]) -> Iterator[Documentation]:
    """Every documented object of `packages`; `python` is the standard library with its topics. Repeated texts once.

    Packages are read side by side in processes of their own. ValueError names one that is not installed.
    """
    seen: set[str] = set()
    with ProcessPoolExecutor(max_workers=min(len(packages), os.cpu_count() or 1) or 1) as pool:
        for items in pool.map(_package_prose, packages):
            for item in items:
                if item.text not in seen:
                    seen.add(item.text)
                    yield item


def _package_prose(package: str) -> list[Documentation]:
    found = (Documentation(name, package, prose(raw)) for name, raw in _package(package))
    return [item for item in found if len(item.text.split()) >= MIN_WORDS]


def _package(package: str) -> Iterator[tuple[str, str]]:
    if package == "python":
        stdlib = Path(sysconfig.get_path("stdlib"))
        yield from ((f"python.topics.{name}", raw) for name, raw in _topics(stdlib / "pydoc_data" / "topics.py"))
        yield from _docstrings(stdlib, "python.")
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {package} is not installed; the demo reads its documentation: pip install {package}")
    yield from _docstrings(Path(spec.origin).parent, f"{package}.")


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return None


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    tree = _parse(path)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value), str(value.value)


def _docstrings(root: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of every module, class and function below `root`, and of torch's `add_docstr` calls."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        module = prefix + ".".join(relative.with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")
        tree = _parse(path)
        if tree is None:
            continue
        if path.name in ("_torch_docs.py", "_tensor_docs.py"):
            yield from _added_docstrings(tree, module)
        else:
            yield from _walk(tree, module.removesuffix("."))


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=True)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):
            yield from _walk(child, name)


def _added_docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Torch documents its C functions as `add_docstr(torch.abs, "...")`: the longest string argument is the text."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        texts = [
            leaf.value
            for arg in node.args
            for leaf in ast.walk(arg)
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
        ]
        if texts and len(max(texts, key=len)) > 80:
            yield f"{module}.{_target(node.args[0])}", textwrap.dedent(max(texts, key=len))


def _target(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return ast.unparse(node) if isinstance(node, ast.Attribute) else "text"


_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`_{0,2}")
_LITERAL = re.compile(r"`{1,2}~?([^`]+)`{1,2}_{0,2}")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([^*\s][^*]*)\*{1,2}(?![\w*])")
_FOOTNOTE = re.compile(r"\s*\[[\w#*]{1,12}\]_{0,2}")
_FIELD = re.compile(r"^\s*(?:[:@]\w[^:]*:|[\w*., /]+ ?\(.*?\): |\*{0,2}\w[\w, *]* : \S)")
_NOT_PROSE = re.compile(r">>>|\\[a-zA-Z]+|[{}|]|::|\$|</?\w+>|_{2,}|={2,}|->|https?:|\bdef \w+\(|\w\(.*=.*\)")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\d{1,2}[.)]|\([a-z0-9]\))\s+")
_SENTENCE_END = (".", "!", "?", '."', ".)")


def prose(docstring: str) -> str:
    """The paragraphs of a docstring that read as English, one a line; empty where there are none."""
    return "\n".join(filter(None, map(_paragraph, _paragraphs(docstring))))


def _paragraphs(docstring: str) -> Iterator[list[str]]:
    """Blocks of lines between blank lines, bullets apart, without literal blocks and directives."""
    block: list[str] = []
    dropped_indent: int | None = None  # inside a literal block or directive that began at this indent
    for line in [*textwrap.dedent(docstring).expandtabs().splitlines(), ""]:
        indent = len(line) - len(line.lstrip())
        if dropped_indent is not None:
            if not line.strip() or indent > dropped_indent:
                continue
            dropped_indent = None
        bullet = _BULLET.match(line)
        if (
            not line.strip()
            or bullet
            or (block and indent != len(block[-1]) - len(block[-1].lstrip()) and not _BULLET.match(block[-1]))
        ):
            if block:
                yield block
            block = []
        if re.match(r"\s*(\.\. |>>>)", line):
            dropped_indent = indent - (">>>" in line)
        elif line.strip():
            block.append(line)
            if line.rstrip().endswith("::"):
                yield block
                block, dropped_indent = [], indent


def _paragraph(lines: list[str]) -> str:
    if any(re.match(r"\s*([-=~^*#+]{3,}|[-=+ ]{6,})\s*$", line) for line in lines) or _FIELD.match(lines[0]):
        return ""  # a heading with its underline, a table, or a parameter list
    text = " ".join(line.strip() for line in lines)
    text = _BULLET.sub("", text)
    text = _FOOTNOTE.sub("", _EMPHASIS.sub(r"\1", _LITERAL.sub(r"\1", _ROLE.sub(r"\1", text))))
    text = re.sub(r"\s+", " ", text).replace("::", ":").replace(" :", ":").strip()
    words = text.split()
    if len(words) < 5 or not text[0].isupper() or not text.endswith(_SENTENCE_END) or _NOT_PROSE.search(text):
        return ""  # a fragment, a list entry, code or a formula
    plain = sum(word.strip(".,;:!?()'\"").replace("-", "").replace("'", "").isalpha() for word in words)
    return text if plain >= 0.8 * len(words) else ""

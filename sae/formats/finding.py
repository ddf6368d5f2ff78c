"""Which reader a folder or a file is for: one table of all layouts, seen from names of files and of tensors.

A new layout is a module with `read`, and a line here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sae.formats import (
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    openai,
    qresearch,
    reference_run,
    saelens,
    sparsify,
)
from sae.formats.weights import read_pickle
from sae.model import SAE


class Layout(NamedTuple):
    """A layout of folders: all of `files` lie in one of it."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], SAE]

    def fits(self, folder: Path) -> bool:
        return all(any(folder.glob(name)) for name in self.files)


class StateDict(NamedTuple):
    """A layout of single files: all of `names` are keys of their state dict."""

    name: str
    names: tuple[str, ...]
    read: Callable[[dict[str, Any], Path], SAE]


def _refused(reason: str) -> Callable[[Path], SAE]:
    def read(folder: Path) -> NoReturn:
        raise ValueError(f"{folder}: {reason}")

    return read


FOLDERS = (
    Layout("saelens", saelens.FILES, saelens.read),
    Layout("sparsify", sparsify.FILES, sparsify.read),
    Layout("dictionary_learning", dictionary_learning.FILES, dictionary_learning.read),
    Layout("llama_scope", llama_scope.FILES, llama_scope.read),
    Layout("llama_scope_r1", llama_scope.R1_FILES, llama_scope.read_r1),
    Layout("gemma_scope", gemma_scope.FILES, gemma_scope.read),
)
STATE_DICTS = (
    StateDict("goodfire", goodfire.NAMES, goodfire.read),
    StateDict("qresearch", qresearch.NAMES, qresearch.read),
    StateDict("reference_run", reference_run.NAMES, reference_run.read),
    StateDict("openai", openai.NAMES, openai.read),
)
SUFFIXES = (".pt", ".pth")
NOT_HELD = (
    Layout(
        "temporal",
        ("conf.yaml", "latest_ckpt.safetensors"),
        _refused("a temporal SAE, whose attention reads the tokens before as well; an SAE here reads one row at a time"),
    ),
    Layout(
        "cross-layer transcoder",
        ("W_enc_*.safetensors", "W_dec_*.safetensors"),
        _refused("a cross-layer transcoder, which writes into several layers; an SAE here reads and writes at one site"),
    ),
    Layout(
        "transcoder",
        ("layer_*.safetensors",),
        _refused(
            "transcoders of circuit-tracer, which read at one site and write at another; only SAEs of one site can be read"
        ),
    ),
)


def read(path: Path) -> SAE:
    """The SAE in a folder, or in a file, of any known layout; its provenance says which. ValueError
    says what lies there where it is none, and lists the folders where it holds several.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such folder or file; expected an SAE")
    try:
        name, sae = _of_folder(path) if path.is_dir() else _of_file(path)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None
    facts = {key: value for key, value in sae.cfg.provenance.items() if value is not None}
    sae.cfg = replace(sae.cfg, provenance={"layout": name} | facts)
    return sae.eval()


def _of_folder(folder: Path) -> tuple[str, SAE]:
    for layout in (*FOLDERS, *NOT_HELD):
        if layout.fits(folder):
            return layout.name, layout.read(folder)
    if inside := hookpoints(folder):
        listed = ", ".join(place.relative_to(folder).as_posix() for place in inside)
        raise ValueError(f"{folder}: holds {len(inside)} SAE(s) in folders of their own; give one of them: {listed}")
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) == 1:
        return _of_state_dict(files[0])
    if files:
        raise ValueError(f"{folder}: holds {len(files)} files; give one of them: {', '.join(file.name for file in files)}")
    held = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"{folder}: holds no SAE of a known layout. It holds {held}; expected {known_layouts()}")


def hookpoints(folder: Path) -> list[Path]:
    """The folders below, three deep at most, that hold an SAE each."""
    levels = ("*", "*/*", "*/*/*")
    below = sorted(place for level in levels for place in folder.glob(level) if place.is_dir())
    return [place for place in below if any(layout.fits(place) for layout in FOLDERS)]


def _of_file(path: Path) -> tuple[str, SAE]:
    """A file of a folder's layout stands for the folder."""
    for folder in path.parents[:2]:
        for layout in (*FOLDERS, *NOT_HELD):
            if any(path.relative_to(folder).match(name) for name in layout.files) and layout.fits(folder):
                return layout.name, layout.read(folder)
    if path.suffix in SUFFIXES:
        return _of_state_dict(path)
    raise ValueError(f"{path}: not an SAE of a known layout; expected {known_layouts()}")


def _of_state_dict(path: Path) -> tuple[str, SAE]:
    tensors = read_pickle(path)
    for layout in STATE_DICTS:
        if set(layout.names) <= set(tensors):
            return layout.name, layout.read(tensors, path)
    if set(dictionary_learning.LINEAR) <= set(tensors) or "W_enc" in tensors:
        raise ValueError(f"{path}: reads as an ae.pt of dictionary_learning; expected its config.json beside it")
    held = ", ".join(sorted(tensors)[:8]) or "nothing"
    raise ValueError(f"{path}: a state dict of no known layout. It holds {held}; expected {known_layouts()}")


def known_layouts() -> str:
    folders = [f"{layout.name} ({', '.join(layout.files)})" for layout in FOLDERS]
    return "; ".join([*folders, f"a .pt or .pth file of {', '.join(layout.name for layout in STATE_DICTS)}"])

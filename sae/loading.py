"""An SAE from wherever it lies: a folder of ours, a folder or file of another library, the Hub."""

from pathlib import Path

import torch

from core.artifact import MANIFEST, Manifest
from sae import model
from sae.formats import finding
from sae.formats.hub import locate
from sae.model import SAE


def load(source: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE at `source`, ready to use (no gradients), its weights in `dtype` on `device`.

    `source` is a folder of ours (`run/sae`), a folder or file of another library, whose layout is seen from its files, or a
    Hub id: `owner/name`, with the SAE's place behind it where there are several, `owner/name/layers.10` or
    `owner/name:layers.10`. ValueError says what lies there where it is no SAE, and lists the SAEs where there are several.
    """
    return read(locate(source), device, dtype)


def read(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE in a folder or file on this disk. ValueError as `load` raises it."""
    if is_ours(path):
        return model.load(path if path.is_dir() else path.parent, device, dtype)
    return finding.read(path).to(device, dtype)


def is_ours(path: Path) -> bool:
    """Whether a folder, or that of a file, is the output of a stage of ours that holds an SAE."""
    folder = path if path.is_dir() else path.parent
    return (folder / MANIFEST).is_file() and Manifest.read(folder).kind == "sae"

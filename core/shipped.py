"""What ships beside the packages for a model that is called by a word: an SAE of it, and what is known of its latents.

It is found by path, never imported; only the embedded model itself lies there too.
"""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent.parent / "demo"
FOLDERS = {"demo": FOLDER, "smollm2": FOLDER / "smollm2"}
"""Of each such word, the folder that holds `sae/`, `top/`, `explanations/` and `steering/`."""


class Shipped(NamedTuple):
    """Folders of one SAE; those that may lack are None where they do."""

    sae: Path
    top: Path
    explanations: Path | None
    steering: Path | None


def is_word(model: str) -> bool:
    """Whether `--model` is a word for which an SAE may ship."""
    return model in FOLDERS


def absence(model: str) -> str:
    """Why nothing is found for such a word, in one line; empty where its SAE is there, or for other models."""
    if not is_word(model) or (FOLDERS[model] / "sae").is_dir():
        return ""
    return f"{FOLDERS[model] / 'sae'}: no such folder, so --model {model} brings no features; give --sae and --top"


def shipped_for(model: str) -> Shipped | None:
    """What ships for `--model`; None for other models, and where `absence` says why."""
    if not is_word(model) or absence(model):
        return None
    folder = FOLDERS[model]
    explanations, steering = (path if path.is_dir() else None for path in (folder / "explanations", folder / "steering"))
    return Shipped(folder / "sae", folder / "top", explanations, steering)

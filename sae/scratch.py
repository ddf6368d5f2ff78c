"""What preprocessing keeps between its passes: files inside the folder it writes, under a name with a leading dot."""

import shutil
from pathlib import Path

import safetensors.torch
from torch import Tensor

SCRATCH = ".scratch"


def chunk_name(index: int) -> str:
    return f"{SCRATCH}/.chunk-{index:06d}.safetensors"


def bucket_name(bucket: int) -> str:
    return f"{SCRATCH}/.bucket-{bucket:06d}.safetensors"


def read_scratch(folder: Path, name: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / name)


def remove_scratch(folder: Path) -> None:
    """Everything is done, or the folder was complete all along: these files are no longer needed."""
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)

"""Files of tensors: safetensors, and the pickles of other libraries, which are never run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor


def named(error: BaseException) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """ValueError where the file is damaged."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged ({named(error)}); fetch it again") from None
    return tensors


def read_pickle(path: Path) -> dict[str, Any]:
    """A state dict: tensors by name, and perhaps plain values. ValueError where it is anything
    else: of a pickle, what would run code is refused before it runs.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes reach torch's unpickler, which fails in any way
        raise ValueError(f"{path}: not a state dict of tensors, or damaged ({named(error)})") from None
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise ValueError(f"{path}: holds {type(held).__name__}; expected a state dict of tensors")
    return dict(held)


def taken(tensors: Mapping[str, Any], path: Path, names: Iterable[str], optional: Iterable[str] = ()) -> list[Tensor]:
    """The tensors of these names. ValueError where one is missing, or there are others that would
    change what is computed.
    """
    names = list(names)
    missing, strange = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names) - set(optional))
    if missing or strange:
        raise ValueError(f"{path}: expected tensors {', '.join(names)}; missing: {missing}, not known: {strange}")
    for name in names:
        if not isinstance(tensors[name], Tensor):
            raise ValueError(f"{path}: {name} is {type(tensors[name]).__name__}; expected a tensor")
        dimensions = 2 if name.startswith("W_") or name.endswith("weight") else 1
        if tensors[name].dim() != dimensions and (dimensions == 2 or tensors[name].dim()):
            raise ValueError(f"{path}: {name} has shape {list(tensors[name].shape)}; expected {dimensions} dimension(s)")
    return [tensors[name] for name in names]

"""Files of tensors: safetensors, and the pickles of other libraries, which are never run."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def named(error: BaseException) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_safetensors(path: Path) -> Tensors:
    """ValueError where the file is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged ({named(error)}); fetch it again") from None


def read_pickle(path: Path) -> Tensors:
    """A state dict of tensors. ValueError where it is anything else: a pickle that would run code is refused unread."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not a state dict of tensors ({named(error)})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: expected a state dict of tensors; is it a backup from the middle of training?")
    return dict(tensors)


def taken(tensors: Tensors, path: Path, names: Iterable[str], optional: Iterable[str] = ()) -> list[Tensor]:
    """The tensors of these names. ValueError where one is missing, or there are others that would change what is computed."""
    names = list(names)
    missing, strange = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names) - set(optional))
    if missing or strange:
        raise ValueError(f"{path}: expected tensors {', '.join(names)}; missing: {missing}, not known: {strange}")
    return [tensors[name] for name in names]

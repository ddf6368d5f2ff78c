"""Gemma Scope's layout: `params.npz` with `W_enc` [d, n], `W_dec` [n, d], `b_enc`, `b_dec` and
`threshold` [n].

JumpReLU; `b_dec` is not subtracted before the encoder (sae-lens 6.54.12,
get_gemma_2_config_from_hf, which also takes names that begin with `w_`, and drops a
`scaling_factor` of ones). The names of the folders give layer, place and L0.
"""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae.formats.plain import plain_of, sae_of
from sae.formats.sites import layer_in
from sae.formats.weights import named, taken
from sae.model import SAE

FILES = ("params.npz",)
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
PLACES = {"res": "resid_post", "mlp": "ffn_out"}


def read(folder: Path) -> SAE:
    path = folder / FILES[0]
    tensors = _arrays(path)
    ones = tensors.get("scaling_factor")
    if ones is not None and bool((ones == 1).all()):
        del tensors["scaling_factor"]
    folder = folder.resolve()
    W_enc, *others = taken(tensors, path, NAMES)
    l0 = layer_in(folder, r"average_l0_(\d+)$")
    return sae_of(plain_of(W_enc.T, *others).absorbed(sign=1), "jumprelu", l0, {"site": _site(folder)})


def _arrays(path: Path) -> dict[str, Tensor]:
    """ValueError where the file is damaged or holds pickled objects, which are not read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a file of arrays, or damaged ({named(error)}); fetch it again") from None
    if strange := [name for name, array in arrays.items() if array.dtype.kind != "f"]:
        raise ValueError(f"{path}: {strange[0]} holds {arrays[strange[0]].dtype}; expected floating-point numbers")
    return {re.sub("^w_", "W_", name): torch.from_numpy(array) for name, array in arrays.items()}


def _site(folder: Path) -> str | None:
    """`.../gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71` reads the residual stream after layer 20."""
    layer = layer_in(folder, r"^layer_(\d+)$")
    words = {word for part in folder.parts for word in re.split(r"[-_]", part)}
    places = [place for word, place in PLACES.items() if word in words]
    return f"layers.{layer}.{places[0]}" if layer is not None and len(places) == 1 else None

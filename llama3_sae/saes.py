"""SAEs from wherever they lie: what ships here, our folders, those of other libraries, the Hub."""

from pathlib import Path

import torch

from core.shipped import absence, is_word, shipped_for
from sae import SAE, load


def load_sae(source: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE at `source`: `demo` or `smollm2` (those that ship), or whatever `sae.load` takes: a folder of ours (`run/sae`), a
    folder or file of another library, a Hub id (`owner/name`, `owner/name:layers.10`).

    ValueError as `sae.load` raises it.
    """
    if is_word(str(source)):
        found = shipped_for(str(source))
        if found is None:
            raise ValueError(absence(str(source)))
        source = found.sae
    return load(source, device)

"""SAEs from wherever they lie: what ships here, our folders, those of other libraries, the Hub."""

from pathlib import Path

import torch

from core.shipped import absence, is_word, shipped_for
from sae.convert import read
from sae.formats.hub import locate
from sae.model import SAE


def load_sae(source: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE at `source`: `demo` or `smollm2` (those that ship), a folder of ours (`run/sae`), a folder or file of another
    library (its layout is seen from its files), or a Hub id: `owner/name`, with the SAE's place behind it where
    there are several, `owner/name/layers.10` or `owner/name:layers.10`.

    ValueError says what lies there where it is no SAE, and lists the SAEs where there are several.
    """
    if is_word(str(source)):
        found = shipped_for(str(source))
        if found is None:
            raise ValueError(absence(str(source)))
        source = found.sae
    return read(locate(source)).to(device)

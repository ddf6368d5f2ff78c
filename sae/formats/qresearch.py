"""qresearch's SAEs: one file of `encoder.*` and `decoder.*`, without a configuration.

`encoder.weight` [n, d], `decoder.weight` [d, n] and a bias each. ReLU; the decoder's bias is not
subtracted before the encoder (the loader in sae-lens 6.54.12, get_deepseek_r1_config_from_hf). The
name of the file gives model and layer.
"""

from pathlib import Path
from typing import Any

from sae.formats.goodfire import named_provenance
from sae.formats.plain import plain_of, sae_of
from sae.formats.weights import taken
from sae.model import SAE

NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def read(tensors: dict[str, Any], path: Path) -> SAE:
    W_enc, b_enc, W_dec, b_dec = taken(tensors, path, NAMES)
    return sae_of(plain_of(W_enc, b_enc, W_dec.T, b_dec).absorbed(sign=1), "relu", None, named_provenance(path))

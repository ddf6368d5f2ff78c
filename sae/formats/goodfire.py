"""Goodfire's SAEs: one file of a linear encoder and a linear decoder, without a configuration.

`encoder_linear.weight` [n, d], `decoder_linear.weight` [d, n] and a bias each. ReLU; the decoder's
bias is not subtracted before the encoder (the loader in sae-lens 6.54.12,
get_goodfire_config_from_hf). The name of the file gives model and layer.
"""

import re
from pathlib import Path
from typing import Any

from sae.formats.plain import plain_of, sae_of
from sae.formats.weights import taken
from sae.model import SAE

NAMES = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")


def read(tensors: dict[str, Any], path: Path) -> SAE:
    W_enc, b_enc, W_dec, b_dec = taken(tensors, path, NAMES)
    plain = plain_of(W_enc, b_enc, W_dec.T, b_dec).absorbed(sign=1)
    return sae_of(plain, "relu", None, named_provenance(path))


def named_provenance(path: Path) -> dict[str, Any]:
    """What `Llama-3.1-8B-Instruct-SAE-l19.pth`, or a folder of that name, says: the residual stream
    after layer 19.
    """
    for part in (path.stem, *reversed(path.parent.parts)):
        if found := re.search(r"([\w.-]+)-SAE-l(\d+)$", part):
            model = found[1].rpartition("--")[2]  # the Hub's cache: models--Goodfire--Llama-...
            owner = "meta-llama/" if model.startswith("Llama-") else "deepseek-ai/" if model.startswith("DeepSeek-") else ""
            return {"model": owner + model, "site": f"layers.{found[2]}.resid_post"}
    return {}

"""The reference run's checkpoints (llama3_interpretability_sae): one `.pth`, the state dict of its
module.

`encoder.weight` [n, d], `encoder.bias` [n], `decoder.weight` [d, n], `b_pre` [d]. Each row is
normalised by its own mean and unbiased standard deviation, with 1e-6 added to the latter; top-k.
The file does not hold k: it is 64 in that run's source, as the site is (attention's normalised
input of layer 23). Its decoder is normalised along the wrong axis, so rows have no unit norm.
"""

from pathlib import Path
from typing import Any

from sae.formats.plain import Norm, plain_of, sae_of
from sae.formats.weights import taken
from sae.model import SAE

NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "b_pre")
K, EPS, SITE = 64, 1e-6, "layers.23.attn_norm"


def read(tensors: dict[str, Any], path: Path) -> SAE:
    W_enc, b_enc, W_dec, b_pre = taken(tensors, path, NAMES)
    plain = plain_of(W_enc, b_enc, W_dec.T, b_pre)
    return sae_of(plain, "topk", K, {"site": SITE}, Norm("layer", norm_eps=EPS))

"""OpenAI's SAEs (sparse_autoencoder): one `.pt`, a state dict with the name of the activation
function in it.

`pre_bias` [d], `encoder.weight` [n, d], `latent_bias` [n], `decoder.weight` [d, n]; `activation`
and `activation_state_dict`. Read from openai/sparse_autoencoder, model.py,
Autoencoder.from_state_dict: a missing `activation` is ReLU, and TopK stands for rows that are
normalised one by one (LN, with 1e-5 added to the unbiased standard deviation).
"""

from pathlib import Path
from typing import Any

from sae.formats.keys import Keys
from sae.formats.plain import PLAIN, Norm, plain_of, sae_of
from sae.formats.weights import taken
from sae.model import SAE

NAMES = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
ACTIVATION = ("activation", "activation_state_dict")
EPS = 1e-5


def read(tensors: dict[str, Any], path: Path) -> SAE:
    keys = Keys(path, {name: tensors[name] for name in ACTIVATION if name in tensors})
    top_k = keys.one_of("activation", "TopK", "ReLU", default="ReLU") == "TopK"
    W_enc, b_enc, W_dec, b_pre = taken(tensors, path, NAMES, optional=(*STATISTICS, *ACTIVATION))
    plain = plain_of(W_enc, b_enc, W_dec.T, b_pre)
    if not top_k:
        return sae_of(plain, "relu", None, {}, PLAIN)
    details = keys.object("activation_state_dict")
    k = details.need("k", int)
    details.one_of("postact_fn", "ReLU")
    details.refuse_others()
    return sae_of(plain, "topk", k, {}, Norm("layer", norm_eps=EPS))

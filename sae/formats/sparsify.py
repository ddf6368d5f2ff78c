"""sparsify (eai-sparsify): `cfg.json` and `sae.safetensors`, with `encoder.weight` and `W_dec` both [n, d].

Read from eai-sparsify 1.3: sparse_coder.py, config.py. It selects after the ReLU, which is the same for top-k.
"""

from pathlib import Path

import safetensors.torch

from sae.formats.keys import Keys
from sae.formats.plain import Plain, as_json, fold, sae_of
from sae.formats.weights import read_safetensors, taken
from sae.model import SAE

FILES = ("cfg.json", "sae.safetensors")


def write(sae: SAE) -> dict[str, bytes]:
    """topk and matryoshka. ValueError for the others, and for `layer`."""
    cfg = sae.cfg
    if cfg.architecture not in ("topk", "matryoshka"):
        raise ValueError(f"sparsify knows top-k alone; this SAE is {cfg.architecture}; export with --to saelens")
    plain = fold(sae, "sparsify")
    tensors = {"encoder.weight": plain.W_enc, "encoder.bias": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    values = {
        "activation": "topk",
        "expansion_factor": max(1, cfg.n_latents // cfg.d_model),
        "normalize_decoder": True,
        "num_latents": cfg.n_latents,
        "k": cfg.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": cfg.d_model,
        "llama3_sae": cfg.provenance,
    }
    return {"cfg.json": as_json(values), "sae.safetensors": safetensors.torch.save(tensors)}


def read(folder: Path) -> SAE:
    """ValueError for group-max, transcoders, skip connections, and the signed SAEs of old versions."""
    cfg, weights = Keys.read(folder / "cfg.json"), folder / "sae.safetensors"
    # Older files lack these; SparseCoderConfig (eai-sparsify 1.3.3, config.py) then takes the same values.
    cfg.one_of("activation", "topk", default="topk")
    for name in ("skip_connection", "transcode"):
        cfg.one_of(name, False, default=False)
    cfg.one_of("signed", False, default=False)  # of the first versions: absolute values compete; later ones have no such key
    k, provenance = cfg.need("k", int), cfg.object("llama3_sae")
    cfg.skip("d_in", "num_latents", "expansion_factor", "normalize_decoder", "multi_topk")  # shapes and training
    cfg.refuse_others()
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    return sae_of(Plain(*taken(read_safetensors(weights), weights, names)).on_cpu(), "topk", k, provenance.values)

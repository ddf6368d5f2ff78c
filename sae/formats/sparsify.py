"""sparsify (eai-sparsify): `cfg.json` and `sae.safetensors`, with `encoder.weight` and `W_dec` both [n, d].

Read from eai-sparsify 1.3: sparse_coder.py, config.py. It selects after the ReLU, which is the same for top-k.
"""

from pathlib import Path

import safetensors.torch

from sae.formats.plain import Plain, as_json, fold, name_of, read_json, sae_of, taken
from sae.model import SAE

FILES = ("cfg.json", "sae.safetensors")


def write(sae: SAE) -> dict[str, bytes]:
    """topk and matryoshka. ValueError for the others, and for `layer`."""
    cfg = sae.cfg
    activation = name_of("sparsify", cfg)
    plain = fold(sae, "sparsify")
    tensors = {"encoder.weight": plain.W_enc, "encoder.bias": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    values = {
        "activation": activation,
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
    cfg, weights = read_json(folder / "cfg.json"), folder / "sae.safetensors"
    for name, plain_value in {"activation": "topk", "skip_connection": False, "transcode": False, "signed": False}.items():
        if cfg.get(name, plain_value) != plain_value:
            raise ValueError(f"{folder}: {name} is {cfg[name]!r}, which this SAE cannot compute; expected {plain_value!r}")
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    plain = Plain(*(tensor.float() for tensor in taken(safetensors.torch.load_file(weights), weights, *names)))
    return sae_of(plain, "topk", int(cfg["k"]), cfg.get("llama3_sae") or {})

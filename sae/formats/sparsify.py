"""sparsify (eai-sparsify): `cfg.json` and `sae.safetensors`, with `encoder.weight` and `W_dec` both [n, d].

Read from eai-sparsify 1.3.3: sparse_coder.py, config.py. It selects after the ReLU, which is the same for top-k.
"""

import logging
import re
from pathlib import Path
from typing import Any

import safetensors.torch

from sae.formats.keys import Keys
from sae.formats.plain import as_json, fold, name_of, plain_of, sae_of
from sae.formats.sites import site_of_module
from sae.formats.weights import read_safetensors, taken
from sae.model import SAE

FILES = ("cfg.json", "sae.safetensors")
EARLY_SITES = ("resid_post", "resid_pre")

log = logging.getLogger("sae.formats")


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
    cfg, weights = Keys.read(folder / "cfg.json"), folder / "sae.safetensors"
    # Older files lack these; SparseCoderConfig (eai-sparsify 1.3.3, config.py) then takes the same values.
    cfg.one_of("activation", "topk", default="topk")
    for name in ("skip_connection", "transcode"):
        cfg.one_of(name, False, default=False)
    cfg.one_of("signed", False, default=False)  # of the first versions: absolute values compete; later ones have no such key
    k, own = cfg.need("k", int), cfg.object("llama3_sae").values
    if cfg.get("multi_topk", bool, False):
        log.info("%s: trained with multi_topk, a loss at 4 k as well; what it computes at k is the same", folder)
    d_in = cfg.need("d_in", int)
    cfg.skip("num_latents", "expansion_factor", "normalize_decoder")  # what the tensors say too, and training
    cfg.refuse_others()
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    plain = plain_of(*taken(read_safetensors(weights), weights, names))
    if plain.W_enc.shape[-1] != d_in:
        raise ValueError(f"{weights}: encoder.weight is {list(plain.W_enc.shape)}, but cfg.json says d_in {d_in}")
    return sae_of(plain, "topk", k, own or _provenance(folder))


def _provenance(folder: Path) -> dict[str, Any]:
    """The folder is named after the module whose output it reads, `layers.5.mlp` for instance, with
    a folder a seed inside where there are several; the run's `config.json`, beside it, names the
    model.
    """
    hookpoint = folder.resolve()
    if re.fullmatch(r"seed\d+", hookpoint.name):
        hookpoint = hookpoint.parent
    facts: dict[str, Any] = {"site": site_of_module(hookpoint.name)}
    if early := re.fullmatch(r"layer_(\d+)", hookpoint.name):  # of the first versions, which did not name modules
        facts = {"site": f"layers.{early[1]}.resid_post", "site_candidates": [f"layers.{early[1]}.{n}" for n in EARLY_SITES]}
        log.warning("%s: layer_%s may be the input or the output of that layer; try both sites", folder, early[1])
    if (run := hookpoint.parent / "config.json").is_file():
        facts["model"] = Keys.read(run).note("model")
    return facts

"""SAELens, from 6.0 on: `cfg.json` and `sae_weights.safetensors`, with `W_enc` [d, n].

Read from sae_lens 6.54: saes/sae.py (SAEConfig, the normalisations), saes/{standard,topk,jumprelu}_sae.py (encode and decode).
"""

from pathlib import Path
from typing import Any

import safetensors.torch

from core.norms import row_norms, unit_rows
from sae.formats.plain import Plain, as_json, fold, read_json, sae_of, taken
from sae.model import SAE

FILES = ("cfg.json", "sae_weights.safetensors")
ARCHITECTURES = {"topk": "topk", "matryoshka": "topk", "relu": "standard", "jumprelu": "jumprelu", "batchtopk": "jumprelu"}
OURS = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu"}
LAYER_EPS = 1e-5  # of its `layer_norm`, which puts the std back without it
HOOKS = {
    "attn_heads": "attn.hook_z",  # [B, T, heads, head_dim] there
    "attn_out": "hook_attn_out",
    "ffn_hidden": "mlp.hook_post",
    "ffn_out": "hook_mlp_out",
} | {name: f"hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post")}


def hook_name(site: str) -> str | None:
    """TransformerLens' name of a site, `layers.3.resid_post` being `blocks.3.hook_resid_post`; None where it has none."""
    _, _, rest = site.partition("layers.")
    layer, _, place = rest.partition(".")
    return f"blocks.{layer}.{HOOKS[place]}" if place in HOOKS else None


def site_of(hook: str) -> str | None:
    """The other way round."""
    _, _, rest = hook.partition("blocks.")
    layer, _, place = rest.partition(".")
    return next((f"layers.{layer}.{name}" for name, theirs in HOOKS.items() if theirs == place), None)


def write(sae: SAE) -> dict[str, bytes]:
    """All architectures; batchtopk as the jumprelu that it is at inference, matryoshka as topk. A `layer` norm is kept, with
    SAELens' epsilon in place of ours.
    """
    cfg, layer = sae.cfg, sae.cfg.norm == "layer"
    plain = Plain(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_pre, sae.threshold).on_cpu() if layer else fold(sae, "SAELens")
    tensors = {"W_enc": plain.W_enc.T.contiguous(), "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    if plain.threshold is not None:
        tensors["threshold"] = plain.threshold
    site = str(cfg.provenance.get("site", ""))
    values: dict[str, Any] = {
        "architecture": ARCHITECTURES[cfg.architecture],
        "d_in": cfg.d_model,
        "d_sae": cfg.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if layer else "none",
        "reshape_activations": "hook_z" if site.endswith(".attn_heads") else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",  # the format's; without it the nested names are dropped
            "sae_lens_training_version": None,
            "model_name": cfg.provenance.get("model"),
            "hook_name": hook_name(site),
            "hook_head_index": None,
            "context_size": cfg.provenance.get("max_length"),
            "prepend_bos": cfg.provenance.get("bos") == "feed",
            "llama3_sae": cfg.provenance,
        },
    }
    if values["architecture"] == "topk":
        values |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    return {"cfg.json": as_json(values), "sae_weights.safetensors": safetensors.torch.save(tensors)}


def read(folder: Path) -> SAE:
    """ValueError for what this cannot hold: gated SAEs, transcoders, and a normalisation whose scale lies elsewhere."""
    cfg, weights = read_json(folder / "cfg.json"), folder / "sae_weights.safetensors"
    kind = cfg.get("architecture")
    if kind not in OURS:
        raise ValueError(
            f"{folder}: architecture {kind!r} cannot be read; expected one of {', '.join(OURS)}, written by SAELens 6"
        )
    norm = cfg.get("normalize_activations", "none")
    if norm not in ("none", "layer_norm"):
        raise ValueError(
            f"{folder}: normalize_activations {norm!r} keeps its scale elsewhere; fold it into the weights in SAELens"
        )
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["threshold"] * (kind == "jumprelu")
    W_enc, *others = taken(safetensors.torch.load_file(weights), weights, *names)
    plain = Plain(W_enc.T.float(), *(tensor.float() for tensor in others))
    if cfg.get("rescale_acts_by_decoder_norm"):  # h times the rows' norms, and rows of unit norm
        norms = row_norms(plain.W_dec).float()
        plain = plain._replace(W_enc=plain.W_enc * norms[:, None], b_enc=plain.b_enc * norms, W_dec=unit_rows(plain.W_dec))
    if not cfg.get("apply_b_dec_to_input", True):
        plain = plain.absorbed(sign=1)
    metadata = cfg.get("metadata") or {}
    provenance = metadata.get("llama3_sae") or {
        "site": site_of(metadata.get("hook_name") or ""),
        "model": metadata.get("model_name"),
    }
    layer = {"norm": "layer", "eps": LAYER_EPS} if norm == "layer_norm" else {}
    return sae_of(plain, OURS[kind], int(cfg.get("k", 1)), provenance, **layer)  # type: ignore[arg-type]

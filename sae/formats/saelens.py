"""SAELens, from 6.0 on: `cfg.json` and `sae_weights.safetensors`, with `W_enc` [d, n].

Read from sae_lens 6.54: saes/sae.py (SAEConfig, the normalisations), saes/{standard,topk,jumprelu}_sae.py (encode and decode).
"""

from pathlib import Path
from typing import Any

import safetensors.torch

from sae.formats.plain import Plain, as_json, fold, kinds, name_of, read_json, sae_of, taken, tensor_names, unfolded
from sae.model import SAE

FILES = ("cfg.json", "sae_weights.safetensors")
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
    """All architectures, or what they are at inference. A `layer` norm is kept, with
    SAELens' epsilon in place of ours.
    """
    cfg, layer = sae.cfg, sae.cfg.norm == "layer"
    plain = unfolded(sae) if layer else fold(sae, "SAELens")
    tensors = {"W_enc": plain.W_enc.T.contiguous(), "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    if plain.r_mag is not None:
        W_gate, b_gate = plain.gate()
        tensors |= {"W_enc": W_gate.T.contiguous(), "b_gate": b_gate, "r_mag": plain.r_mag, "b_mag": tensors.pop("b_enc")}
    elif plain.threshold is not None:
        tensors["threshold"] = plain.threshold
    site = str(cfg.provenance.get("site", ""))
    values: dict[str, Any] = {
        "architecture": name_of("saelens", cfg),
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
    if sae.selects_top_k:
        values |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    return {"cfg.json": as_json(values), "sae_weights.safetensors": safetensors.torch.save(tensors)}


def read(folder: Path) -> SAE:
    """ValueError for what this cannot hold: transcoders, and a normalisation whose scale lies elsewhere."""
    cfg, weights = read_json(folder / "cfg.json"), folder / "sae_weights.safetensors"
    kind, ours = cfg.get("architecture"), kinds("saelens")
    if kind not in ours:
        raise ValueError(
            f"{folder}: architecture {kind!r} cannot be read; expected one of {', '.join(ours)}, written by SAELens 6"
        )
    norm = cfg.get("normalize_activations", "none")
    if norm not in ("none", "layer_norm"):
        raise ValueError(
            f"{folder}: normalize_activations {norm!r} keeps its scale elsewhere; fold it into the weights in SAELens"
        )
    plain = _tensors(weights, tensor_names(ours[kind]))
    if cfg.get("rescale_acts_by_decoder_norm"):  # h times the rows' norms, and rows of unit norm
        plain = plain.unit_rows()._replace(threshold=plain.threshold)
    if not cfg.get("apply_b_dec_to_input", True):
        plain = plain.absorbed(sign=1)
    metadata = cfg.get("metadata") or {}
    provenance = metadata.get("llama3_sae") or {
        "site": site_of(metadata.get("hook_name") or ""),
        "model": metadata.get("model_name"),
    }
    layer = {"norm": "layer", "eps": LAYER_EPS} if norm == "layer_norm" else {}
    return sae_of(plain, ours[kind], int(cfg.get("k", 1)), provenance, **layer)  # type: ignore[arg-type]


def _tensors(path: Path, fields: set[str]) -> Plain:
    """What the file holds, for an SAE of these fields of `Plain`."""
    tensors = safetensors.torch.load_file(path)
    if "r_mag" in fields:
        W_enc, W_dec, b_dec, *gate = taken(tensors, path, "W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag")
        encoder = Plain.gated(W_enc.T.float(), *(tensor.float() for tensor in gate))
        return Plain(**encoder, W_dec=W_dec.float(), b_dec=b_dec.float())
    found = dict(zip(sorted(fields), taken(tensors, path, *sorted(fields)), strict=True))
    return Plain(**{name: (tensor.T if name == "W_enc" else tensor).float() for name, tensor in found.items()})

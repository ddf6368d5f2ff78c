"""Llama Scope (Language-Model-SAEs): `hyperparams.json` and `checkpoints/final.safetensors`; its R1
variant: `config.json` and `sae_weights.safetensors`, which holds `log_jumprelu_threshold` [n]
besides.

`encoder.weight` [n, d], `decoder.weight` [d, n] and a bias each, for rows of norm sqrt(d) on
average. With a = sqrt(d) / mean norm of what is read and o of what is written, rows as they are
want `b_E / a`, `b_D / o` and `W_D a / o`, then rows of unit norm where
`sparsity_include_decoder_norm` (Language-Model-SAEs: standardize_parameters_of_dataset_norm,
transform_to_unit_decoder_norm).

`jump_relu_threshold` is compared with what comes out of that as it stands: the authors' initializer
does not scale it, and sae-lens 6.54.12 (get_llama_scope_config_from_hf) multiplies it by a because
its latents are a times these. A threshold in the R1 variant is one of normalised rows, hence
divided by a (the same library's loaders of both).
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.formats.keys import Keys
from sae.formats.plain import plain_of, sae_of
from sae.formats.sites import site_of_hook
from sae.formats.weights import read_safetensors, taken
from sae.model import SAE

FILES = ("hyperparams.json", "checkpoints/final.safetensors")
R1_FILES = ("config.json", "sae_weights.safetensors")
NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
LOG_THRESHOLD = "log_jumprelu_threshold"
AVERAGE = "dataset_average_activation_norm"
MODEL = "meta-llama/Llama-3.1-8B"  # of both series, whose files do not say


class Facts:
    """What the configuration says, both spellings of it; training's flags, which the authors'
    loader drops, are left out.
    """

    def __init__(self, cfg: Keys) -> None:
        # Defaults: what sae-lens 6.54.12 supposes, which asks for none of these keys.
        cfg.one_of("act_fn", "jumprelu", default="jumprelu")
        cfg.one_of("norm_activation", "dataset-wise", default="dataset-wise")
        cfg.one_of("use_decoder_bias", True, default=True)
        cfg.one_of("use_glu_encoder", False, default=False)
        cfg.one_of("sae_type", "sae", default="sae")
        self.hook = cfg.need("hook_point_in", str)
        if (written := cfg.get("hook_point_out", str, self.hook)) != self.hook:
            raise ValueError(
                f"{cfg.where}: hook_point_in is {self.hook!r} and hook_point_out {written!r}: a transcoder; only SAEs "
                "that read and write at one site can be read"
            )
        self.d_model = cfg.need("d_model", int)
        self.n_latents = cfg.get("d_sae", int, 0) or self.d_model * cfg.need("expansion_factor", int)
        self.subtracts = cfg.get("apply_decoder_bias_to_pre_encoder", bool, False)
        self.includes_norm = cfg.get("sparsity_include_decoder_norm", bool, False)
        self.k = cfg.get("top_k", int, 0) or None
        self.provenance: dict[str, Any] = {"model": MODEL, "site": site_of_hook(self.hook)}


def read(folder: Path) -> SAE:
    """The series of Llama 3.1 8B, at any of its sites."""
    cfg, path = Keys.read(folder / FILES[0]), folder / FILES[1]
    facts = Facts(cfg)
    norms = cfg.object(AVERAGE)
    a, o = (math.sqrt(facts.d_model) / norms.positive(name) for name in ("in", "out"))
    facts.provenance["threshold_factor"] = 1 / a  # were it one of normalised rows; sae.adopt measures which
    threshold = torch.full((facts.n_latents,), cfg.need("jump_relu_threshold", float))
    return _read(facts, path, taken(read_safetensors(path), path, NAMES), (a, o), threshold)


def read_r1(folder: Path) -> SAE:
    """The R1 variant. The mean norm stands in either file."""
    cfg, path = Keys.read(folder / R1_FILES[0]), folder / R1_FILES[1]
    facts, tensors = Facts(cfg), read_safetensors(path)
    scalars = {name: tensors.pop(name).tolist() for name in list(tensors) if name.startswith(AVERAGE)}
    named = {name.removeprefix(f"{AVERAGE}."): value for name, value in scalars.items()}
    norms = Keys(f"{path}: {AVERAGE}", named) if named else cfg.object(AVERAGE)
    key = next((name for name in (facts.hook, "in") if name in norms), facts.hook)
    a = math.sqrt(facts.d_model) / norms.positive(key)
    *four, log_threshold = taken(tensors, path, (*NAMES, LOG_THRESHOLD))
    return _read(facts, path, four, (a, a), log_threshold.float().exp() / a)


def _read(facts: Facts, path: Path, tensors: list[Tensor], scales: tuple[float, float], threshold: Tensor) -> SAE:
    a, o = scales
    W_enc, b_enc, W_dec, b_dec = tensors
    if (shape := list(W_enc.shape)) != [facts.n_latents, facts.d_model]:
        raise ValueError(
            f"{path}: encoder.weight is {shape}; its configuration says {facts.n_latents} latents of {facts.d_model} dimensions"
        )
    plain = plain_of(W_enc, b_enc, W_dec.T, b_dec, threshold)
    if facts.subtracts:
        plain = plain.absorbed()
    plain = plain._replace(b_enc=plain.b_enc / a, W_dec=plain.W_dec * (a / o), b_dec=plain.b_dec / o)
    if facts.includes_norm:  # the product with the norm is compared with the threshold
        plain = plain.unit_rows()._replace(threshold=plain.threshold)
    return sae_of(plain.absorbed(sign=1), "jumprelu", facts.k, facts.provenance)

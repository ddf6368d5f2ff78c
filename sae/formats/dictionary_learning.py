"""dictionary_learning: `ae.pt`, a state dict, and `config.json`, with the decoder [d, n] where it is an nn.Linear.

Read from dictionary-learning 0.1: utils.load_dictionary, dictionary.py, trainers/top_k.py, trainers/batch_top_k.py. `ae.pt` is
a pickle by that library's choice: written from plain tensors, and read with `weights_only=True`.
"""

import io
import pickle
from pathlib import Path

import torch
from torch import Tensor

from sae.formats.plain import Plain, as_json, fold, kinds, name_of, read_json, sae_of, taken
from sae.model import SAE

FILES = ("ae.pt", "config.json")
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")


def write(sae: SAE) -> dict[str, bytes]:
    """All architectures; matryoshka as topk. ValueError for `layer`, and for thresholds that differ in a batchtopk."""
    cfg, plain = sae.cfg, fold(sae, "dictionary_learning")
    kind = name_of("dictionary_learning", cfg)
    tensors = _state_dict(plain, kind, cfg.k)
    trainer = {
        "dict_class": kind,
        "trainer_class": None,
        "activation_dim": cfg.d_model,
        "dict_size": cfg.n_latents,
        "k": cfg.k,
        "lm_name": cfg.provenance.get("model"),
        "submodule_name": cfg.provenance.get("site"),
        "layer": _layer(str(cfg.provenance.get("site", ""))),
    }
    buffer = {"d_submodule": cfg.d_model, "ctx_len": cfg.provenance.get("max_length")}
    content = io.BytesIO()
    torch.save(tensors, content)
    config = {"trainer": trainer, "buffer": buffer, "llama3_sae": cfg.provenance}
    return {"ae.pt": content.getvalue(), "config.json": as_json(config)}


def _state_dict(plain: Plain, kind: str, k: int) -> dict[str, Tensor]:
    """As the class `kind` names its tensors."""
    linear = {"encoder.weight": plain.W_enc, "encoder.bias": plain.b_enc, "decoder.weight": plain.W_dec.T.contiguous()}
    if kind == "AutoEncoder":
        return linear | {"bias": plain.b_dec}
    if kind == "JumpReluAutoEncoder":
        assert plain.threshold is not None
        b_enc = plain.absorbed().b_enc  # its encoder does not subtract b_dec
        threshold = plain.threshold.clamp_min(0)
        weights = {"W_enc": plain.W_enc.T.contiguous(), "W_dec": plain.W_dec}
        return weights | {"b_enc": b_enc, "b_dec": plain.b_dec, "threshold": threshold}
    if kind == "GatedAutoEncoder":
        assert plain.r_mag is not None
        (W_gate, b_gate), biases = plain.gate(), {"decoder_bias": plain.b_dec, "mag_bias": plain.b_enc, "r_mag": plain.r_mag}
        return biases | {"encoder.weight": W_gate, "gate_bias": b_gate, "decoder.weight": linear["decoder.weight"]}
    threshold = torch.tensor(-1.0)
    if plain.threshold is not None:
        threshold = plain.threshold[0].clone()
        if not bool((plain.threshold == threshold).all()):
            raise ValueError("dictionary_learning's BatchTopKSAE has one threshold for all latents; export with --to saelens")
    return linear | {"b_dec": plain.b_dec, "k": torch.tensor(k, dtype=torch.int32), "threshold": threshold}


def _layer(site: str) -> int | None:
    number = site.removeprefix("layers.").partition(".")[0]
    return int(number) if number.isdigit() else None


def read(folder: Path) -> SAE:
    """ValueError for other classes of dictionaries and for what training leaves behind half way."""
    config, weights = read_json(folder / "config.json"), folder / "ae.pt"
    trainer = config.get("trainer") or {}
    kind = trainer.get("dict_class")
    ours = kinds("dictionary_learning")
    if kind not in ours:
        raise ValueError(f"{folder}: dict_class {kind!r} cannot be read; expected one of {', '.join(ours)}")
    try:
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{weights}: not a state dict of tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{weights}: expected a state dict of tensors; is it a backup from the middle of training?")
    provenance = config.get("llama3_sae") or {"model": trainer.get("lm_name")}
    if kind == "JumpReluAutoEncoder":
        W_enc, *others = taken(tensors, weights, "W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        return sae_of(Plain(W_enc.T, *others).absorbed(sign=1), "jumprelu", int(trainer.get("k") or 1), provenance)
    if kind == "AutoEncoder":
        W_enc, b_enc, W_dec, b_dec = taken(tensors, weights, *LINEAR, "bias")
        return sae_of(Plain(W_enc, b_enc, W_dec.T, b_dec), "relu", int(trainer.get("k") or 1), provenance)
    if kind == "GatedAutoEncoder":
        names = ("encoder.weight", "gate_bias", "r_mag", "mag_bias")
        W_dec, b_dec, *gate = taken(tensors, weights, "decoder.weight", "decoder_bias", *names)
        plain = Plain(**Plain.gated(*gate), W_dec=W_dec.T, b_dec=b_dec)
        return sae_of(plain.unit_rows(), "gated", int(trainer.get("k") or 1), provenance)  # as its encode and decode do
    W_enc, b_enc, W_dec, b_dec, k, threshold = taken(tensors, weights, *LINEAR, "b_dec", "k", "threshold")
    thresholds = threshold.clamp_min(0).expand(len(W_enc)) if kind == "BatchTopKSAE" else None
    return sae_of(Plain(W_enc, b_enc, W_dec.T, b_dec, thresholds), ours[kind], int(k), provenance)

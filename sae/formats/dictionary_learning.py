"""dictionary_learning: `ae.pt`, a state dict, and `config.json`, with the decoder [d, n] where it
is an nn.Linear.

Read from dictionary-learning 0.1.0: utils.load_dictionary, dictionary.py,
trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py. `ae.pt` is a pickle by that library's
choice: written from plain tensors, and read with `weights_only=True`.
"""

import io
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.architectures import architecture
from sae.formats.keys import Keys
from sae.formats.plain import Plain, as_json, fold, kinds, name_of, plain_of, sae_of
from sae.formats.sites import model_name, site_of_module
from sae.formats.weights import read_pickle, taken
from sae.model import SAE

FILES = ("ae.pt", "config.json")
# Classes that no architecture here is exported as; groups of a matryoshka matter while training alone.
ALSO_READ = {"MatryoshkaBatchTopKSAE": "batchtopk", "AutoEncoderNew": "relu"}
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
GATED = ("encoder.weight", "gate_bias", "r_mag", "mag_bias", "decoder.weight", "decoder_bias")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
NAMES = {
    "AutoEncoderTopK": (*LINEAR, "b_dec"),
    "BatchTopKSAE": (*LINEAR, "b_dec", "threshold"),
    "MatryoshkaBatchTopKSAE": PARAMETERS,
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "JumpReluAutoEncoder": PARAMETERS,
}
# AutoEncoderTopK keeps a threshold in newer files, which its encoder does not use unless it is asked to.
UNUSED = {"AutoEncoderTopK": ("threshold",), "MatryoshkaBatchTopKSAE": ("group_sizes",)}
PLAIN_INPUT = ("AutoEncoderNew", "JumpReluAutoEncoder")  # their encoders do not subtract the decoder's bias
PLACES = {"resid_post": "resid_post", "resid": "resid_post", "mlp_out": "ffn_out", "mlp": "ffn_out"}
PLACES |= {"attn_out": "attn_out", "attn": "attn_out"}

log = logging.getLogger("sae.formats")


def write(sae: SAE) -> dict[str, bytes]:
    """All architectures, or what they are at inference. ValueError for `layer`, and for thresholds
    that differ in a batchtopk.
    """
    cfg, plain = sae.cfg, fold(sae, "dictionary_learning")
    kind = name_of("dictionary_learning", cfg)
    if kind == "AutoEncoder" and not _of_unit_norm(plain.W_dec):
        kind = "AutoEncoderNew"  # AutoEncoder would give the rows unit norm, and latents another size
    tensors = _state_dict(plain, kind, cfg.k)
    trainer = {
        "dict_class": kind,
        "trainer_class": None,
        "activation_dim": cfg.d_model,
        "dict_size": cfg.n_latents,
        "k": cfg.k,
        "lm_name": model_name(cfg.provenance.get("model")),
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
    if kind == "AutoEncoderNew":
        return linear | {"encoder.bias": plain.absorbed().b_enc, "decoder.bias": plain.b_dec}
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
    """ValueError for other classes of dictionaries and for what training leaves behind half way.

    The class and the tensors decide what is computed; other keys of `trainer` and `buffer` are how it was trained.
    """
    config, weights = Keys.read(folder / "config.json"), folder / "ae.pt"
    trainer = config.object("trainer")
    ours = kinds("dictionary_learning") | ALSO_READ
    kind = str(trainer.one_of("dict_class", *ours))
    name = ours[kind]
    tensors = read_pickle(weights)
    if "ae" in tensors:
        raise ValueError(f"{weights}: a backup from the middle of training, in other units; expected the ae.pt of its end")
    k = None
    if architecture(name).sets_k:
        k = trainer.need("k", int)  # AutoEncoderTopK.from_pretrained(path, k=k) takes it and refuses another in the file
        held: Any = torch.as_tensor(tensors.pop("k", k)).tolist()
        if held != k:
            raise ValueError(f"{weights}: k is {held}, but config.json says {k}; the folder was put together wrongly")
    plain = _plain(kind, tensors, weights)
    if k is not None and plain.threshold is not None and bool((plain.threshold < 0).any()):
        log.warning("%s: its threshold was never set, which makes it a ReLU; a checkpoint of the first steps?", weights)
    provenance = config.object("llama3_sae").values or {"model": trainer.note("lm_name"), "site": _site(trainer, folder)}
    return sae_of(plain, name, k, provenance)


def _plain(kind: str, tensors: dict[str, Any], weights: Path) -> Plain:
    if kind == "GatedAutoEncoder":
        W_gate, b_gate, r_mag, b_mag, W_dec, b_dec = taken(tensors, weights, GATED)
        return Plain.gated((W_gate, b_gate), r_mag, b_mag, W_dec.T, b_dec)
    W_enc, b_enc, W_dec, b_dec, *threshold = taken(tensors, weights, NAMES[kind], optional=UNUSED.get(kind, ()))
    if "W_enc" in NAMES[kind]:
        W_enc = W_enc.T
    else:
        W_dec = W_dec.T
    plain = plain_of(W_enc, b_enc, W_dec, b_dec, *threshold)
    if kind in PLAIN_INPUT:
        return plain.absorbed(sign=1)
    if kind == "AutoEncoder" and not _of_unit_norm(plain.W_dec):
        return plain.unit_rows()  # as its from_pretrained does, which makes latents that many times larger
    return plain


def _of_unit_norm(W_dec: Tensor) -> bool:
    """As AutoEncoder.normalize_decoder asks."""
    norms = torch.linalg.vector_norm(W_dec, dim=1)
    return torch.allclose(norms, torch.ones_like(norms))


def _site(trainer: Keys, folder: Path) -> str | None:
    """What `submodule_name` or a folder says, `resid_post_layer_15` for instance; the layer alone
    means the residual stream, as the loader in sae-lens 6.54.12 takes it
    (get_dictionary_learning_config_1_from_hf).
    """
    for name in (str(trainer.note("submodule_name") or ""), *reversed(folder.resolve().parts)):
        if found := re.fullmatch(r"(resid_post|resid|mlp_out|mlp|attn_out|attn)_layer_(\d+)", name):
            return f"layers.{found[2]}.{PLACES[found[1]]}"
        if re.fullmatch(r"layers\.\d+\.\w+", name):
            return site_of_module(name) or name
    layer = trainer.note("layer")
    return f"layers.{layer}.resid_post" if isinstance(layer, int) else None

"""dictionary_learning: `ae.pt`, a state dict, and `config.json`, with the decoder [d, n] where it is an nn.Linear.

Read from dictionary-learning 0.1: utils.load_dictionary, dictionary.py, trainers/top_k.py, trainers/batch_top_k.py. `ae.pt` is
a pickle by that library's choice: written from plain tensors, and read with `weights_only=True`.
"""

import io
from pathlib import Path

import torch
from torch import Tensor

from sae.formats.keys import Keys
from sae.formats.plain import Plain, as_json, fold, sae_of
from sae.formats.weights import read_pickle, taken
from sae.model import SAE

FILES = ("ae.pt", "config.json")
CLASSES = {
    "topk": "AutoEncoderTopK",
    "matryoshka": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "relu": "AutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
}
OURS = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "AutoEncoder": "relu", "JumpReluAutoEncoder": "jumprelu"}
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")


def write(sae: SAE) -> dict[str, bytes]:
    """All architectures; matryoshka as topk. ValueError for `layer`, and for thresholds that differ in a batchtopk."""
    cfg, plain = sae.cfg, fold(sae, "dictionary_learning")
    linear = {"encoder.weight": plain.W_enc, "encoder.bias": plain.b_enc, "decoder.weight": plain.W_dec.T.contiguous()}
    tensors: dict[str, Tensor]
    if cfg.architecture == "jumprelu":
        absorbed = plain.absorbed()  # its encoder does not subtract b_dec
        tensors = {"W_enc": plain.W_enc.T.contiguous(), "W_dec": plain.W_dec, "b_enc": absorbed.b_enc, "b_dec": plain.b_dec}
        assert plain.threshold is not None
        tensors["threshold"] = plain.threshold.clamp_min(0)
    elif cfg.architecture == "relu":
        tensors = linear | {"bias": plain.b_dec}
    else:
        threshold = torch.tensor(-1.0)
        if plain.threshold is not None:
            threshold = plain.threshold[0].clone()
            if not bool((plain.threshold == threshold).all()):
                raise ValueError(
                    "dictionary_learning's BatchTopKSAE has one threshold for all latents; export with --to saelens"
                )
        tensors = linear | {"b_dec": plain.b_dec, "k": torch.tensor(cfg.k, dtype=torch.int32), "threshold": threshold}
    trainer = {
        "dict_class": CLASSES[cfg.architecture],
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


def _layer(site: str) -> int | None:
    number = site.removeprefix("layers.").partition(".")[0]
    return int(number) if number.isdigit() else None


def read(folder: Path) -> SAE:
    """ValueError for other classes of dictionaries and for what training leaves behind half way.

    The class and the tensors decide what is computed; other keys of `trainer` and `buffer` are how it was trained.
    """
    config, weights = Keys.read(folder / "config.json"), folder / "ae.pt"
    trainer = config.object("trainer")
    kind = trainer.one_of("dict_class", *OURS)
    tensors = read_pickle(weights)
    provenance = config.object("llama3_sae").values or {"model": trainer.note("lm_name")}
    if kind == "JumpReluAutoEncoder":  # its encoder does not subtract b_dec
        W_enc, *others = taken(tensors, weights, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))
        return sae_of(Plain(W_enc.T, *others).on_cpu().absorbed(sign=1), "jumprelu", None, provenance)
    if kind == "AutoEncoder":
        W_enc, b_enc, W_dec, b_dec = taken(tensors, weights, (*LINEAR, "bias"))
        return sae_of(_as_loaded(Plain(W_enc, b_enc, W_dec.T, b_dec).on_cpu()), "relu", None, provenance)
    k = trainer.need("k", int)  # AutoEncoderTopK.from_pretrained(path, k=k) asks for it too, and for the same in the file
    held = tensors.pop("k", torch.tensor(k))
    if held.numel() != 1 or int(held) != k:
        raise ValueError(f"{weights}: k is {held.tolist()}, but config.json says {k}; the folder was put together wrongly")
    if kind == "BatchTopKSAE":
        W_enc, b_enc, W_dec, b_dec, threshold = taken(tensors, weights, (*LINEAR, "b_dec", "threshold"))
        return sae_of(Plain(W_enc, b_enc, W_dec.T, b_dec, threshold.expand(len(W_enc))).on_cpu(), "batchtopk", k, provenance)
    # Files from before the class kept a threshold hold none; its encoder does not use it unless asked to.
    W_enc, b_enc, W_dec, b_dec = taken(tensors, weights, (*LINEAR, "b_dec"), optional=("threshold",))
    return sae_of(Plain(W_enc, b_enc, W_dec.T, b_dec).on_cpu(), "topk", k, provenance)


def _as_loaded(plain: Plain) -> Plain:
    """AutoEncoder.from_pretrained gives rows of another norm unit norm, and so latents of another size."""
    norms = torch.linalg.vector_norm(plain.W_dec, dim=1)
    return plain if torch.allclose(norms, torch.ones_like(norms)) else plain.unit_rows()

"""SAEs of the embedded model, trained for a moment, in the layouts of other libraries: each case hides one thing that
`sae.adopt` has to find.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from llama3 import load_model, load_tokenizer
from sae.adopt import PASSAGES
from sae.adopting.measuring import Reader
from sae.formats.plain import Norm, Plain, sae_of, unfolded
from sae.loss import LossConfig
from sae.model import SAE, SAEConfig, best_encoder_norm

LAYER, K, N_LATENTS, STEPS, BATCH = 4, 16, 512, 200, 256
SITE = f"layers.{LAYER}.resid_post"
HIDDEN = ("site", "bos", "text", "norm", "bias")
LAYOUTS = ("saelens", "sparsify", "dictionary_learning", "params.npz")


@cache
def rows(bos: str, text: str) -> Tensor:
    """Rows [N, d] of sentences that are read so, without those of abnormal norm."""
    passages = [json.loads(line)["text"] for line in PASSAGES.read_text(encoding="utf-8").splitlines()]
    sentences = [sentence for passage in passages[::8] for sentence in passage.split(". ")[:4] if len(sentence) > 20]
    reader = Reader(load_model("demo", torch.device("cpu")), load_tokenizer("demo"), sentences, 64, 4096)
    return reader.rows([SITE], bos, text, 20_000, 0)[SITE].x


@cache
def trained(bos: str = "none", text: str = "plain", norm: str = "dataset") -> SAE:
    """A topk SAE of rows that are read so. Its rows of the encoder are trained too, so that `b_pre` matters. Those of other
    rows go on from that of plain text.
    """
    x = rows(bos, text)
    d = x.shape[1]
    scale = math.sqrt(d) / float(x.norm(dim=1).mean()) if norm == "dataset" else 1.0
    sae = SAE(SAEConfig(d_model=d, n_latents=N_LATENTS, k=K, norm=norm, scale=scale, norm_eps=1e-5))
    first = (bos, text, norm) == ("none", "plain", "dataset")
    begun = None if first else trained().state_dict()
    generator = torch.Generator().manual_seed(0)
    z = sae.normalised_rows(x)
    with torch.no_grad():
        sae.initialise_("tied", generator, encoder_norm=best_encoder_norm(N_LATENTS, K, d))
        if begun:
            sae.load_state_dict(begun)
        sae.b_pre.copy_(z.mean(0))
    adam = torch.optim.Adam(sae.parameters(), lr=2e-3)
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = 2e-3 * (1 - step / STEPS)
        batch = z[torch.randint(len(z), (BATCH,), generator=generator)]
        adam.zero_grad()
        (sae.losses(batch, LossConfig(K)).objective / batch.numel()).backward()
        adam.step()
        sae.constrain_()
    return sae.requires_grad_(False)


def in_raw_units(sae: SAE) -> Plain:
    """The tensors for rows as they are."""
    plain, s = unfolded(sae), sae.cfg.scale
    return plain._replace(b_enc=plain.b_enc / s, b_dec=plain.b_dec / s)


def in_unit_norm(sae: SAE, x: Tensor) -> Plain:
    """The tensors for rows of mean squared norm 1."""
    plain, s = in_raw_units(sae), 1 / float(x.square().sum(1).mean().sqrt())
    return plain._replace(b_enc=plain.b_enc * s, b_dec=plain.b_dec * s)


def threshold_of(plain: Plain, norm: Norm, x: Tensor) -> float:
    """What the latents must exceed so that K are active on average."""
    sae = sae_of(plain, "topk", K, {}, norm)
    h = sae.pre_activations(sae.normalised_rows(x[:4000]))
    return float(h.flatten().kthvalue(h.numel() - K * len(h)).values)


class Made(NamedTuple):
    """Where a case lies, and what is to be found."""

    path: Path
    site: str
    bos: str
    text: str
    norm: str
    bias: str


def make(hidden: str, layout: str, root: Path) -> Made:
    """A case in which the files do not say what `hidden` is, or say something else."""
    bos, text = {"bos": ("feed", "plain"), "text": ("feed", "chat")}.get(hidden, ("none", "plain"))
    sae, x = trained(bos, text), rows(bos, text)
    plain, norm, bias = in_raw_units(sae), Norm(), "as-read"
    found_norm = "as-read"
    if hidden == "norm":
        found_norm = {"saelens": "dataset", "sparsify": "layer"}.get(layout, "unit")
        if found_norm == "layer":
            sae = trained(norm="layer")
            plain, norm = unfolded(sae), Norm("layer", norm_eps=1e-5)
        elif found_norm == "unit":
            plain, norm = in_unit_norm(sae, x), Norm("dataset", scale=1 / float(x.square().sum(1).mean().sqrt()))
        else:
            plain, norm = unfolded(sae), Norm("dataset", scale=sae.cfg.scale)
    threshold = torch.full((N_LATENTS,), threshold_of(plain, norm, x))
    if hidden == "bias":  # written for the other kind of encoder
        bias = "removed" if layout == "params.npz" else "added"
    plain = plain.absorbed() if (layout == "params.npz") != (hidden == "bias") else plain
    path = WRITERS[layout](plain, threshold, root, hidden != "site")
    return Made(path, SITE, bos, text, found_norm, bias)


def noise(layout: str, root: Path) -> Path:
    """A case without anything to find: random rows, as long as trained ones."""
    plain, generator = in_raw_units(trained()), torch.Generator().manual_seed(5)
    W_dec = torch.nn.functional.normalize(torch.randn(plain.W_dec.shape, generator=generator), dim=1)
    W_enc = W_dec * plain.W_enc.norm(dim=1, keepdim=True)
    plain = plain._replace(W_enc=W_enc, W_dec=W_dec)
    threshold = torch.full((N_LATENTS,), threshold_of(plain, Norm(), rows("none", "plain")))
    return WRITERS[layout](plain.absorbed() if layout == "params.npz" else plain, threshold, root, True)


def saelens(plain: Plain, threshold: Tensor, root: Path, named: bool) -> Path:
    cfg = {
        "architecture": "topk", "d_in": plain.W_dec.shape[1], "d_sae": N_LATENTS, "dtype": "float32", "device": "cpu", "k": K,
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": f"blocks.{LAYER}.hook_resid_post" if named else None},
    }  # fmt: skip
    weights = {"W_enc": plain.W_enc.T, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    return written(root / "sae", cfg=cfg, **{"sae_weights.safetensors": weights})


def sparsify(plain: Plain, threshold: Tensor, root: Path, named: bool) -> Path:
    cfg = {"d_in": plain.W_dec.shape[1], "expansion_factor": 2, "normalize_decoder": True, "num_latents": N_LATENTS, "k": K}
    weights = {"encoder.weight": plain.W_enc, "encoder.bias": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    # The first versions' name, which may mean the layer's input.
    return written(root / (f"layer_{LAYER}" if named else "sae"), cfg=cfg, **{"sae.safetensors": weights})


def dictionary_learning(plain: Plain, threshold: Tensor, root: Path, named: bool) -> Path:
    trainer = {"dict_class": "BatchTopKSAE", "k": K, "lm_name": "demo"}
    weights = {
        "encoder.weight": plain.W_enc, "encoder.bias": plain.b_enc, "decoder.weight": plain.W_dec.T.contiguous(),
        "b_dec": plain.b_dec, "threshold": threshold[0].clone(), "k": torch.tensor(K),
    }  # fmt: skip
    folder = root / (f"resid_post_layer_{LAYER}" if named else "sae")
    return written(folder, config={"trainer": trainer, "buffer": {}}, **{"ae.pt": weights})


def params_npz(plain: Plain, threshold: Tensor, root: Path, named: bool) -> Path:
    folder = root / (f"x-res/layer_{LAYER}" if named else "x") / f"average_l0_{K}"
    folder.mkdir(parents=True)
    weights = {"W_enc": plain.W_enc.T, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec, "threshold": threshold}
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    return folder


def written(folder: Path, **files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        if name.endswith(".safetensors"):
            safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in content.items()}, folder / name)
        elif name.endswith(".pt"):
            torch.save(content, folder / name)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


WRITERS: dict[str, Callable[[Plain, Tensor, Path, bool], Path]] = {
    "saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning, "params.npz": params_npz,
}  # fmt: skip

"""Folders opened and checked to belong together: an SAE with its model, top sentences and explanations with their SAE."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from core.artifact import check_provenance, open_artifact
from core.norms import row_norms
from interpretability.records import Explanation, TopSentences, open_top, read_explanations
from llama3 import Tokenizer, Transformer
from sae.model import SAE


def check_sae(sae: SAE, path: Path | str, model: Transformer, tokenizer: Tokenizer, other_weights: bool = False) -> str:
    """The site that the SAE reads. ValueError, with both values, where it is not one of this model and tokenizer.

    With `other_weights` the model may be another copy than the SAE was trained on, such as one that is not quantised."""
    origin = {"tokenizer_hash": tokenizer.hash}
    if not other_weights:
        origin["model_hash"] = model.weights_hash
    check_provenance(f"SAE {path}", origin, sae.cfg.provenance, origin)
    try:
        width = model.width(sae.site)
    except ValueError as error:
        raise ValueError(f"SAE {path}: {error}") from None
    if sae.cfg.d_model != width:
        raise ValueError(f"SAE {path}: d_model is {sae.cfg.d_model}, but {sae.site} of the model has width {width}")
    return sae.site


@torch.no_grad()
def fvu_on(sae: SAE, model: Transformer, tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """`sum ||x - x_hat||^2 / sum ||x - mean||^2` over the tokens of `texts`, without the first of each and without rows whose
    norm training left out."""
    site, limit, found = sae.site, sae.cfg.provenance.get("max_norm") or math.inf, []
    for text in texts:
        tokens = torch.tensor([tokenizer.encode_prompt(text)], device=model.device)
        x = model.capture(tokens, site)[site][0, 1:].float()
        found.append(x[row_norms(x) <= limit])
    x = torch.cat(found)
    residual = (x - sae(x)).double().square().sum()
    return float(residual / (x.double() - x.double().mean(0)).square().sum())


def open_top_of(sae: SAE, path: Path) -> TopSentences:
    """Top sentences; ValueError, with both values, where they are not those of `sae` on its own model, tokenizer and site."""
    origin = {key: sae.cfg.provenance.get(key) for key in ("model_hash", "tokenizer_hash", "site")}
    top = open_top(path)
    wanted = origin | {"sae_hash": sae.weights_hash}
    check_provenance(f"top sentences {path}", wanted, top.provenance, wanted)
    return top


def open_explanations_of(sae: SAE, path: Path) -> dict[int, Explanation]:
    """Explanations by latent; ValueError, with both values, where they are not of the latents of `sae`."""
    found = open_artifact(path, "explanations").manifest.provenance
    check_provenance(f"explanations {path}", {"sae_hash": sae.weights_hash}, found, ["sae_hash"])
    return read_explanations(path)

"""What a foreign SAE may have been trained on, and how its tensors may be meant."""

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae.formats.plain import Norm, sae_of, unfolded
from sae.model import SAE

NormName = Literal["as-read", "none", "dataset", "unit", "layer"]
BiasName = Literal["as-read", "added", "removed"]
ThresholdName = Literal["as-read", "scaled"]
LAYER_EPS = 1e-5  # of PyTorch's and SAELens' layer norm

SITE_CANDIDATES, THRESHOLD_FACTOR = "site_candidates", "threshold_factor"
"""In the provenance that a reader gives: other sites that the files may mean, and what the thresholds are to be multiplied
with where they are meant in the other unit."""


class Reading(NamedTuple):
    """What goes into the model, and where rows are taken."""

    site: str
    bos: str
    """feed: BOS before each text, whose row does not count; none."""
    text: str
    """plain, or chat: the text as a user's turn in the model's chat format."""


class Convention(NamedTuple):
    """How the tensors are meant. `as-read` is what the layout says."""

    norm: NormName = "as-read"
    """What rows are before the encoder: none, as they are; dataset, of norm sqrt(d) on average; unit, of mean squared norm 1;
    layer, each by its own mean and standard deviation."""
    bias: BiasName = "as-read"
    """added: `W_enc b_dec` is added to the encoder's bias, which undoes a subtraction of `b_dec` from the rows; removed: the
    other way round."""
    threshold: ThresholdName = "as-read"
    """scaled: in the other unit that the reader names."""

    @property
    def departures(self) -> int:
        """In how many parts this is not what the layout says."""
        return sum(part != "as-read" for part in self)

    def __str__(self) -> str:
        parts = (f"{name} {part}" for name, part in self._asdict().items() if part != "as-read")
        return ", ".join(parts) or "as read"


class Candidate(NamedTuple):
    """One way to use the SAE."""

    reading: Reading
    convention: Convention


class Rows(NamedTuple):
    """Rows [N, d] of a site with what normalisation needs to know of them."""

    x: Tensor
    first: Tensor
    """Bool [N]: the first token of a text, which BOS changes most."""
    mean_norm: float
    mean_square: float
    """Mean of the squared norms."""
    median_norm: float
    max_norm: float
    """Rows of larger norm were left out."""


def conventions(sae: SAE, fixed: Convention | None = None) -> list[Convention]:
    """What may be meant, the simplest first; `fixed` holds what the user decided (`as-read` is no decision)."""
    fixed = fixed or Convention()
    norms: list[NormName] = ["as-read", *(name for name in ("none", "dataset", "unit", "layer") if name != sae.cfg.norm)]
    biases: list[BiasName] = ["as-read", "added", "removed"] if bool(sae.b_pre.any()) else ["as-read"]
    scaled = THRESHOLD_FACTOR in sae.cfg.provenance
    thresholds: list[ThresholdName] = ["as-read", "scaled"] if scaled else ["as-read"]
    if fixed.norm != "as-read":
        norms = [fixed.norm]
    if fixed.bias != "as-read":
        biases = [fixed.bias]
    found = [Convention(n, b, t) for n in norms for b in biases for t in thresholds]
    return sorted(found, key=lambda convention: convention.departures)


def meant(sae: SAE, convention: Convention, rows: Rows) -> SAE:
    """`sae` with its tensors taken as `convention` says, for rows like `rows`. Weights are shared where they do not change."""
    cfg = sae.cfg
    norm = _norm(cfg.norm, cfg.scale, cfg.norm_eps, convention.norm, rows)
    if not convention.departures:
        return sae
    plain = unfolded(sae)
    if convention.bias != "as-read":
        plain = plain.absorbed(sign=1 if convention.bias == "added" else -1)
    if convention.threshold == "scaled":
        assert plain.threshold is not None
        plain = plain._replace(threshold=plain.threshold * float(cfg.provenance[THRESHOLD_FACTOR]))
    changed = sae_of(plain, cfg.architecture, cfg.k, cfg.provenance, norm)
    changed.cfg = replace(changed.cfg, prefixes=cfg.prefixes)
    return changed.to(sae.W_enc.device).eval()


def _norm(own: str, scale: float, eps: float, name: NormName, rows: Rows) -> Norm:
    if name == "as-read":
        return Norm(own, scale, eps)
    if name == "layer":
        return Norm("layer", norm_eps=LAYER_EPS)
    if name == "none":
        return Norm()
    d = rows.x.shape[1]
    return Norm("dataset", scale=math.sqrt(d) / rows.mean_norm if name == "dataset" else 1 / math.sqrt(rows.mean_square))


def shuffled(sae: SAE, seed: int) -> SAE:
    """The SAE with the coordinates of its latents' rows in another order: what it explains of any rows by chance."""
    order = torch.randperm(sae.cfg.d_model, generator=torch.Generator().manual_seed(seed)).to(sae.W_enc.device)
    state = {name: tensor.clone() if name.startswith("W_") else tensor for name, tensor in sae.state_dict().items()}
    for name in ("W_enc", "W_dec"):
        state[name] = state[name][:, order]
    with torch.device("meta"):
        other = SAE(sae.cfg)
    other.load_state_dict(state, assign=True)
    return other.requires_grad_(False).eval()


def sites_of(provenance: dict[str, Any], widths: dict[str, int], d_model: int, fixed: str = "") -> list[str]:
    """The sites that the SAE may read, those that its files name first. `widths` are those of all of the model's sites.

    Where the files name one, its neighbours are there to compare with: the other places of its layer, and the residual stream
    after the layers before and after. ValueError where the model has no such site, or none of this width.
    """
    fitting = [site for site, width in widths.items() if width == d_model]
    if not fitting:
        raise ValueError(f"the SAE reads rows of width {d_model}, and the model has no site of it; is it of another model?")
    stated = [fixed] if fixed else [*dict.fromkeys([provenance.get("site"), *provenance.get(SITE_CANDIDATES, [])])]
    named = [site for site in stated if site]
    for site in named:
        if site not in widths:
            raise ValueError(f"the SAE is said to read {site!r}, which this model does not have; is it of another model?")
        if widths[site] != d_model:
            raise ValueError(f"the SAE reads rows of width {d_model}, but {site} of the model has width {widths[site]}")
    if fixed:
        return named
    if not named:
        return _distinct(fitting)
    layers = {int(site.split(".")[1]) for site in named if site.startswith("layers.")}
    near = [site for site in fitting if _near(site, layers)]
    return _distinct([*named, *near])


def _near(site: str, layers: set[int]) -> bool:
    if not site.startswith("layers."):
        return not layers
    _, layer, place = site.split(".")
    return int(layer) in layers or (place == "resid_post" and (int(layer) + 1 in layers or int(layer) - 1 in layers))


def _distinct(sites: list[str]) -> list[str]:
    """Each value of the forward pass under its first name: what enters a layer is what left the one before."""
    kept: dict[str, str] = {}
    for site in sites:
        kept.setdefault(same_value(site), site)
    return list(kept.values())


def same_value(site: str) -> str:
    """One name for the sites that hold the same rows."""
    if site.endswith(".resid_pre"):
        layer = int(site.split(".")[1])
        return f"layers.{layer - 1}.resid_post" if layer else "embed"
    return site

"""SAEs to the folders of SAELens, sparsify and dictionary_learning, and from those and other published layouts.

    python -m sae.convert --sae run/sae --to saelens --out exported/
    python -m sae.convert --sae theirs/ --to sae --out imported/ --activations acts/
    python -m sae.convert --sae run/sae --to sae --dtype int8 --measure acts/ --out small/

The layout of `--sae` is seen from its files: those three (SAELens of any version), Llama Scope, Goodfire,
qresearch, OpenAI, Gemma Scope, and the reference run. What no architecture here computes is refused by
name. After writing, the folder is read back and compared on random rows. Formats without a normalisation
of their own get that of the dataset folded into the biases: latents come out in units of x, divided by
sqrt(d) / E||x||.
"""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from capture.store import Activations, open_activations
from core.artifact import building, open_artifact
from core.cli import StageConfig, run_stage
from core.norms import row_norms
from core.runtime import Runtime
from sae.formats import FORMATS
from sae.loading import load, read
from sae.model import SAE

log = logging.getLogger("sae.convert")

CHECK_ROWS = 64
MEASURED_ROWS = 16_384
FAITHFUL = {"float32": 1e-3, "bfloat16": 0.3, "int8": 0.3}
"""Of a row's norm; layer norm's other epsilon stays below the first where std > 0.01. Rounded weights swap latents about the
k-th, whose values are far from small on random rows: 13 % of the norm with 8,192 latents in int8. --measure takes real ones."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(StageConfig):
    """Flags of the stage."""

    sae: Path
    """Folder or file of an SAE: ours, or one of the other layouts; or a Hub id, owner/name or owner/name:folder."""
    to: Literal["sae", "saelens", "sparsify", "dictionary_learning"]
    """The format to write; sae is ours."""
    out: Path
    """Folder to write."""
    activations: Path | None = None
    """Folder of activations at the SAE's site, whose model, tokenizer, site and BOS policy the SAE is to carry: later stages
    ask for them, and other formats do not know them all."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """--to sae: what tensors are stored in. int8: matrices as 8-bit integers with a float32 scale per row, vectors in
    float32. Two or four times smaller; --measure says what that costs."""
    measure: Path | None = None
    """Folder of activations at the SAE's site on which FVU is measured, as it was and as it is written."""

    def __post_init__(self) -> None:
        if self.dtype != "float32" and self.to != "sae":
            raise ValueError(f"--dtype {self.dtype}: only for --to sae; the format of {self.to} is written in float32")


def run(config: ConvertConfig, runtime: Runtime) -> None:
    """Read, write, read back, compare. One process does it all."""
    if runtime.world_size > 1:
        raise ValueError("sae.convert is the work of one process; start it without torchrun")
    sae = load(config.sae)
    inputs = []
    if config.activations:
        activations = _read_by(sae, config.activations)
        inputs.append(activations.artifact)
        sae.cfg = replace(sae.cfg, provenance=sae.cfg.provenance | activations.provenance)
    kind = "sae" if config.to == "sae" else f"sae in the format of {config.to}"
    content = {} if config.to == "sae" else FORMATS[config.to].write(sae)
    provenance = sae.cfg.provenance | {"source_hash": sae.weights_hash}
    with building(config.out, kind, config, runtime, inputs, provenance) as builder:
        if not builder.complete:
            names, sae_hash = [builder.publish(name, data).name for name, data in content.items()], sae.weights_hash
            if config.to == "sae":
                names, sae_hash = sae.publish(builder, "int8" if config.dtype == "int8" else getattr(torch, config.dtype))
            builder.finish(names, {"n_latents": sae.cfg.n_latents}, {"sae_hash": sae_hash})
    written = read(config.out)
    log.info("%s: %s", config.out, compare(sae, written, FAITHFUL[config.dtype]))
    if config.measure:
        activations = _read_by(sae, config.measure)
        before, after = (fvu(one, activations) for one in (sae, written))
        log.info(
            "%s: FVU %.5f as it was, %.5f as it is written, %+.2f %%", config.measure, before, after, 100 * (after / before - 1)
        )


def _read_by(sae: SAE, path: Path) -> Activations:
    """The activations that the SAE reads: those of the folder's only site; where there are several, of the SAE's own."""
    sites = open_artifact(path, "activations").manifest.provenance["sites"]
    site = sites[0] if len(sites) == 1 else sae.cfg.provenance.get("site")
    if site not in sites:
        raise ValueError(
            f"--activations {path}: holds {', '.join(sites)}; the SAE's site is {site!r}; give a folder of the site it reads"
        )
    activations = open_activations(path, site)
    if activations.d_model != sae.cfg.d_model:
        raise ValueError(f"--activations {path}: width {activations.d_model}, but the SAE's is {sae.cfg.d_model}")
    return activations


@torch.no_grad()
def compare(ours: SAE, theirs: SAE, faithful: float = FAITHFUL["float32"]) -> str:
    """What differs between two SAEs on random rows of the size that they expect; ValueError where it is more than rounding."""
    d, generator = ours.cfg.d_model, torch.Generator().manual_seed(0)
    x = (ours.b_pre + torch.randn(CHECK_ROWS, d, generator=generator)) / ours.cfg.scale
    codes = [dense_codes(sae, x) / sae.cfg.scale for sae in (ours, theirs)]
    pairs = {"latents": codes, "reconstructions": [sae(x) for sae in (ours, theirs)]}
    apart = {name: _apart(*pair) for name, pair in pairs.items()}
    text = ", ".join(f"{name} differ by at most {share:.1e} of their norm" for name, share in apart.items())
    l0 = [float((part > 0).sum(1).float().mean()) for part in codes]
    if max(apart.values()) > faithful:
        raise ValueError(f"what was written does not compute the same: {text}; keep the SAE in its own format, and report this")
    return f"{text} in 9 of 10 random rows; l0 {l0[0]:.1f} and {l0[1]:.1f}"


@torch.no_grad()
def fvu(sae: SAE, activations: Activations) -> float:
    """`sum ||x - x_hat||^2 / sum ||x - mean||^2` over the first MEASURED_ROWS rows: without those of a norm that training
    leaves out, and without BOS not the first of a sentence either."""
    limit, found, n = sae.cfg.provenance.get("max_norm") or math.inf, [], 0
    for chunk in activations:
        keep = row_norms(chunk.activations) <= limit
        if activations.provenance.get("bos") != "feed":
            keep[chunk.offsets[:-1][chunk.offsets.diff() > 0]] = False
        found.append(chunk.activations[keep])
        n += len(found[-1])
        if n >= MEASURED_ROWS:
            break
    x = torch.cat(found)[:MEASURED_ROWS]
    residual = sum(float((part - sae(part)).double().square().sum()) for part in torch.split(x, 1024))
    return residual / float((x.double() - x.double().mean(0)).square().sum())


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The difference of two rows [N, m] as a share of their norm, which 9 of 10 rows do not exceed: in few, rounding moves a
    latent across its threshold or out of the best k.
    """
    shares = row_norms(a - b) / row_norms(a).clamp_min(torch.finfo(torch.float64).tiny)
    return float(shares.quantile(0.9, interpolation="higher"))


def dense_codes(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """All latents of rows `x` [N, d]: [N, n_latents], zero where silent."""
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.cfg.n_latents).scatter_add_(1, indices, values)


if __name__ == "__main__":
    run_stage(ConvertConfig, run, __doc__ or "")

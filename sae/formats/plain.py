"""What other libraries can hold: an SAE without a normalisation of its own.

    f = select(W_enc (x - b_dec) + b_enc)        x_hat = f W_dec + b_dec

Shapes: n latents, d model width.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.norms import row_norms, unit_rows
from sae.architectures import architecture, names
from sae.model import SAE, SAEConfig


class Plain(NamedTuple):
    """The tensors."""

    W_enc: Tensor  # [n, d]
    b_enc: Tensor  # [n]
    W_dec: Tensor  # [n, d]
    b_dec: Tensor  # [d]
    threshold: Tensor | None = None  # [n], what a latent must exceed; None: 0, or the best k
    r_mag: Tensor | None = None  # [n], where gates have rows of their own: log of how much longer those of W_enc are

    def on_cpu(self) -> "Plain":
        """As they are stored: float32, contiguous, without gradients."""
        return Plain(*(part if part is None else part.detach().float().cpu().contiguous() for part in self))  # type: ignore[arg-type]

    def unit_rows(self) -> "Plain":
        """The same function with rows of `W_dec` of norm 1 and latents that many times larger."""
        norms = row_norms(self.W_dec).float()
        threshold = None if self.threshold is None else self.threshold * norms
        W_enc, b_enc = self.W_enc * norms[:, None], self.b_enc * norms
        return self._replace(W_enc=W_enc, b_enc=b_enc, W_dec=unit_rows(self.W_dec), threshold=threshold)

    def gate(self) -> tuple[Tensor, Tensor]:
        """Rows [n, d] and bias [n] of a gate that is open where a latent exceeds its threshold."""
        assert self.r_mag is not None
        assert self.threshold is not None
        factor = self.r_mag.exp()
        return self.W_enc / factor[:, None], (self.b_enc - self.threshold) / factor

    @classmethod
    def gated(cls, gate: tuple[Tensor, Tensor], r_mag: Tensor, b_mag: Tensor, W_dec: Tensor, b_dec: Tensor) -> "Plain":
        """The other way round: what to hold of a file's gate, rows [n, d] and bias [n], and the path of the values.
        ValueError as from `plain_of`.
        """
        W_gate, b_gate = gate
        _check({"W_gate": W_gate, "b_gate": b_gate, "r_mag": r_mag, "b_mag": b_mag, "W_dec": W_dec, "b_dec": b_dec})
        W_gate, b_gate, r_mag, b_mag = (tensor.float() for tensor in (W_gate, b_gate, r_mag, b_mag))
        factor = r_mag.exp()
        threshold = b_mag - factor * b_gate
        return plain_of(W_gate * factor[:, None], b_mag, W_dec, b_dec, threshold)._replace(r_mag=r_mag.cpu())

    def absorbed(self, sign: int = -1) -> "Plain":
        """For encoders that do not subtract `b_dec`: `b_enc - W_enc b_dec` in place of `b_enc`; with `sign` 1 the way back."""
        b_enc = self.b_enc.double() + sign * self.W_enc.double() @ self.b_dec.double()
        return self._replace(b_enc=b_enc.float())


def fold(sae: SAE, what: str) -> Plain:
    """`sae` on raw rows, for the format `what`: its latents in units of x, so that rows of `W_dec` keep their unit norm.

    With `z = s x`, `h = W_enc (s x - b_pre) + b_enc` is s times `W_enc (x - b_pre / s) + b_enc / s`, and what is selected does
    not change; `x_hat = (s f W_dec + b_pre) / s`. Latents come out divided by s. ValueError for `layer`, where s differs from
    row to row.
    """
    if sae.cfg.norm == "layer":
        raise ValueError(
            f"this SAE normalises each row by its own mean and std, which no fixed weights can stand for, and {what} has no "
            "such normalisation; export with --to saelens, or train with --norm dataset"
        )
    plain, s = unfolded(sae), sae.cfg.scale
    threshold = None if plain.threshold is None else plain.threshold / s
    return plain._replace(b_enc=plain.b_enc / s, b_dec=plain.b_dec / s, threshold=threshold)


def unfolded(sae: SAE) -> Plain:
    """`sae` on normalised rows."""
    tensors = sae.plain()
    tensors["b_dec"] = tensors.pop("b_pre")
    return Plain(**tensors).on_cpu()


def name_of(form: str, cfg: SAEConfig) -> str:
    """What the format `form` calls an SAE's architecture. ValueError where it has no name for it."""
    kind = architecture(cfg.architecture)
    found = dict(kind.exports)
    while kind.exported_as:  # what stands in for it
        kind = architecture(kind.exported_as)
        found = kind.exports | found
    if form not in found:
        others = f"export with --to {' or '.join(found)}" if found else "keep it in our own format"
        raise ValueError(f"{form} holds only {', '.join(kinds(form))}; this SAE is {cfg.architecture}; {others}")
    return str(found[form])


def kinds(form: str) -> dict[str, str]:
    """Our names of the architectures that the format `form` has names for, by those."""
    found = {name: architecture(name).exports.get(form) for name in names()}
    return {theirs: name for name, theirs in found.items() if theirs}


def tensor_names(name: str) -> set[str]:
    """The fields of `Plain` that an architecture fills."""
    with torch.device("meta"):
        sae = SAE(SAEConfig(d_model=1, n_latents=1, k=1, architecture=name))
    return set(sae.plain()) - {"b_pre"} | {"b_dec"}


def plain_of(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor | None = None) -> Plain:
    """The tensors of a file, as they are stored here; a threshold may be one number for all latents.
    ValueError where their shapes do not fit together, or a number is not finite.
    """
    if threshold is not None and threshold.numel() == 1:
        threshold = threshold.reshape(1).expand(len(W_dec))
    plain = Plain(W_enc, b_enc, W_dec, b_dec, threshold)
    _check({name: tensor for name, tensor in plain._asdict().items() if tensor is not None})
    return plain.on_cpu()


def _check(tensors: Mapping[str, Tensor]) -> None:
    n, d = tensors["W_dec"].shape
    for name, tensor in tensors.items():
        wanted = (n, d) if name.startswith("W_") else (d,) if name == "b_dec" else (n,)
        if tuple(tensor.shape) != wanted or not tensor.numel():
            raise ValueError(f"{name} has shape {list(tensor.shape)}, which does not fit a decoder of {[n, d]}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinite values")


class Norm(NamedTuple):
    """What is done to rows before the encoder and undone after the decoder; as in `SAEConfig`."""

    norm: str = "none"
    scale: float = 1.0
    norm_eps: float = 1e-6


PLAIN = Norm()


def sae_of(plain: Plain, name: str, k: int | None, provenance: dict[str, Any], norm: Norm = PLAIN) -> SAE:
    """The SAE of architecture `name` of these tensors. `k` is None where the layout has none: not all architectures set one."""
    assert k is not None or not architecture(name).sets_k, name
    n, d = plain.W_dec.shape
    parts: dict[str, Any] = {"d_model": d, "n_latents": n, "k": 1 if k is None else k, **norm._asdict()}
    cfg = SAEConfig(**parts, architecture=name, provenance=provenance)
    with torch.device("meta"):
        sae = SAE(cfg)
    tensors = {name: tensor for name, tensor in plain._asdict().items() if tensor is not None}
    tensors["b_pre"] = tensors.pop("b_dec")
    sae.load_plain_({name: tensor.float().contiguous() for name, tensor in tensors.items()})
    return sae.requires_grad_(False)


def as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()

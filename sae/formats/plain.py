"""What other libraries can hold: an SAE without a normalisation of its own.

    f = select(W_enc (x - b_dec) + b_enc)        x_hat = f W_dec + b_dec

Shapes: n latents, d model width.
"""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.norms import row_norms, unit_rows
from sae.model import SAE, SAEConfig


class Plain(NamedTuple):
    """The tensors."""

    W_enc: Tensor  # [n, d]
    b_enc: Tensor  # [n]
    W_dec: Tensor  # [n, d]
    b_dec: Tensor  # [d]
    threshold: Tensor | None = None  # [n]; batchtopk and jumprelu

    def on_cpu(self) -> "Plain":
        """As they are stored: float32, contiguous, without gradients."""
        return Plain(*(part if part is None else part.detach().float().cpu().contiguous() for part in self))  # type: ignore[arg-type]

    def unit_rows(self) -> "Plain":
        """The same function with rows of `W_dec` of norm 1 and latents that many times larger."""
        norms = row_norms(self.W_dec).float()
        threshold = None if self.threshold is None else self.threshold * norms
        return Plain(self.W_enc * norms[:, None], self.b_enc * norms, unit_rows(self.W_dec), self.b_dec, threshold)

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
    s = sae.cfg.scale
    plain = Plain(sae.W_enc, sae.b_enc / s, sae.W_dec, sae.b_pre / s, None if sae.threshold is None else sae.threshold / s)
    return plain.on_cpu()


def plain_of(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor | None = None) -> Plain:
    """The tensors of a file, as they are stored here; a threshold may be one number for all latents.
    ValueError where their shapes do not fit together, or a number is not finite.
    """
    n, d = W_dec.shape
    if threshold is not None and threshold.numel() == 1:
        threshold = threshold.reshape(1).expand(n)
    plain = Plain(W_enc, b_enc, W_dec, b_dec, threshold)
    wanted = {"W_enc": (n, d), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}
    for name, tensor in plain._asdict().items():
        if tensor is not None and (tuple(tensor.shape) != wanted[name] or not tensor.numel()):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, which does not fit a decoder of {[n, d]}")
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    return plain.on_cpu()


class Norm(NamedTuple):
    """What is done to rows before the encoder and undone after the decoder; as in `SAEConfig`."""

    norm: str = "none"
    scale: float = 1.0
    norm_eps: float = 1e-6


PLAIN = Norm()


def sae_of(plain: Plain, architecture: str, k: int | None, provenance: dict[str, Any], norm: Norm = PLAIN) -> SAE:
    """The SAE whose tensors these are. `k` is None where the layout has none: relu and jumprelu do not select by it."""
    assert k is not None or architecture in ("relu", "jumprelu"), architecture
    n, d = plain.W_dec.shape
    parts: dict[str, Any] = {"d_model": d, "n_latents": n, "k": 1 if k is None else k, **norm._asdict()}
    cfg = SAEConfig(**parts, architecture=architecture, provenance=provenance)
    with torch.device("meta"):
        sae = SAE(cfg)
    tensors = {"W_enc": plain.W_enc, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_pre": plain.b_dec}
    if plain.threshold is not None:
        tensors["threshold"] = plain.threshold
    sae.load_state_dict({name: tensor.float().contiguous() for name, tensor in tensors.items()}, assign=True)
    return sae.requires_grad_(False)


def as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()

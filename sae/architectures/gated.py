"""Gated SAEs (Rajamanoharan et al. 2024, arXiv:2404.16014): one path decides which latents are
active, another how much.

With `u = W_enc (z - b_pre)`, the gate is open where `u + b_gate > 0`, and the value is `exp(r_mag)
u + b_mag` where positive. Both paths have the same rows, but for a factor per latent, so the value
tells whether the gate is open: `u + b_gate > 0` where `exp(r_mag) u + b_mag > b_mag - exp(r_mag)
b_gate`. At inference it is a JumpReLU with this threshold (appendix E there).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from core.product import linear
from core.runtime import Mesh
from sae.architectures._dense import DenseSAE
from sae.config import SAEConfig
from sae.loss import ALONE, LossConfig, Losses
from sae.parallel import reduce_from_group
from sae.sparse import encode_at


class Gated(DenseSAE):
    """`b_gate`, `r_mag` and `b_mag` [n_latents] stand in place of `b_enc`; `h` are the values,
    before they are cut.
    """

    exports: ClassVar = {"saelens": "gated", "dictionary_learning": "GatedAutoEncoder"}
    dense_tensors = 6.5
    scalars = 3

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        del self.b_enc  # it has a bias for each path
        self.b_gate, self.r_mag, self.b_mag = (nn.Parameter(torch.zeros(cfg.n_latents)) for _ in range(3))

    def losses(
        self, z: Tensor, config: LossConfig, dead: Tensor | None = None, n_dead: int = 0, mesh: Mesh = ALONE, first: int = 0
    ) -> Losses:
        """Section 3.2 there: the gates' positive pre-activations are penalised, and also reconstruct by
        themselves (`aux`), through a decoder held fixed, so that gates learn when to open: the step
        at 0 has no gradient.
        """
        gate = self.product(z, self.b_gate, mesh)
        f = (self.r_mag.exp() * (gate - self.b_gate) + self.b_mag).relu() * (gate > 0)
        opening = gate.relu()
        part = self.weighed(z, f, opening.sum(), config, mesh)
        z_hat = reduce_from_group(mesh.latent, opening @ self.W_dec.detach()) + self.b_pre.detach()
        aux = (z - z_hat).square().sum()
        return part._replace(objective=part.objective + aux, aux=aux)

    @property
    def floor(self) -> Tensor:
        return self._threshold().clamp_min(0)

    def _threshold(self) -> Tensor:
        """The value at which the gate opens [n]."""
        return self.b_mag - self.r_mag.exp() * self.b_gate

    def pre_activations(self, z: Tensor) -> Tensor:
        return linear(z - self.b_pre, self.W_enc) * self.r_mag.exp() + self.b_mag

    def encoder_rows(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return self.W_enc[latents] * self.r_mag[latents].exp()[:, None], self.b_mag[latents]

    def values_at(self, z: Tensor, indices: Tensor, h: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return h.gather(1, indices)
        factor, no_bias = self.r_mag.exp(), torch.zeros_like(self.b_mag)
        u = encode_at((self.b_pre, self.W_enc, no_bias), z, indices, ((h - self.b_mag) / factor).detach())
        return u * factor[indices] + self.b_mag[indices]

    def plain(self) -> dict[str, Tensor]:
        """`r_mag` comes along, with which the gate's own rows and bias can be told from those of
        the values.
        """
        tensors = self.state_dict()
        W_enc, b_enc = self.encoder_rows(torch.arange(self.cfg.n_latents, device=self.W_enc.device))
        kept = {name: tensors[name] for name in ("W_dec", "b_pre", "r_mag")}
        return kept | {"W_enc": W_enc, "b_enc": b_enc, "threshold": self._threshold()}

    def load_plain_(self, tensors: dict[str, Tensor]) -> None:
        r_mag = tensors.get("r_mag", torch.zeros_like(tensors["b_enc"]))
        factor = r_mag.exp()
        own = {
            "W_enc": tensors["W_enc"] / factor[:, None],
            "b_gate": (tensors["b_enc"] - tensors["threshold"]) / factor,
            "r_mag": r_mag,
            "b_mag": tensors["b_enc"],
        }
        self.load_state_dict(own | {name: tensors[name] for name in ("W_dec", "b_pre")}, assign=True)


ARCHITECTURE = Gated

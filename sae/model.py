"""The sparse autoencoder: its equations, its parameters, and its folder on disk.

Shapes: N rows (any leading shape), d model width, n latents, K entries per row (k for TopK), M chosen latents.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any, ClassVar, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from core.artifact import Builder, building, open_artifact
from core.norms import LARGEST, row_norms, unit_rows
from core.product import linear
from core.runtime import Mesh, Runtime, Solo
from core.text import parse_json, read_text
from sae.architectures import architecture
from sae.config import SAEConfig as SAEConfig
from sae.hyperparameters import Hyperparameters
from sae.loss import ALONE, LossConfig, Losses
from sae.memory import Share
from sae.quantised import Storage, dequantised, quantised
from sae.sparse import decode, encode_at
from sae.topk import top_k

# Pre-activations held at once where no gradient is asked for. On a CPU 16 MB stay in the last level of cache, and malloc gives
# the same pages again; on a GPU larger blocks keep it busy.
CPU_ELEMENTS, GPU_ELEMENTS = 2**22, 2**29


class Latents(NamedTuple):
    """Active latents: `values` [..., K] >= 0 and `indices` [..., K] int64; value 0 where fewer than K fire."""

    values: Tensor
    indices: Tensor


class Normalised(NamedTuple):
    """Normalised rows `z` [..., d] with what undoes it, [..., 1] each: `x = z / scale + mean`."""

    z: Tensor
    mean: Tensor
    scale: Tensor


def layer_normalised(x: Tensor, eps: float) -> Normalised:
    """`(x - mean(x)) / (std(x) + eps)` of each row of `x` [..., d], unbiased std."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    std = (centred.square().sum(-1, keepdim=True) / max(1, x.shape[-1] - 1)).sqrt()
    scale = 1 / (std + eps)
    return Normalised(centred * scale, mean, scale)


def best_encoder_norm(n_latents: int, k: int, d_model: int) -> float:
    """Norm of the encoder's rows at which tied random rows reconstruct best: `1 / (1 + k m / d)`.

    With unit rows, and z of d independent entries of variance 1, the k largest of n entries of h have the mean square m of the
    k largest of n standard normals. `<z, z_hat>` is k m, but `||z_hat||^2` is k m + (k m)^2 / d: rows that were chosen for
    pointing along z point along one another too, and overshoot.
    """
    share, normal = k / n_latents, NormalDist()
    if share == 1:
        return 1 / (1 + k / d_model)
    cut = normal.inv_cdf(1 - share)
    m = 1 + cut * normal.pdf(cut) / share
    return 1 / (1 + k * m / d_model)


class SAE(nn.Module):
    """A sparse autoencoder. Each architecture is a subclass, in sae.architectures; `SAE(cfg)` makes that of `cfg.architecture`.

        z = normalise(x)
        h = W_enc (z - b_pre) + b_enc              values, indices = select(h)
        z_hat = values @ W_dec[indices] + b_pre    x_hat = z_hat / scale + mean

    `W_enc` and `W_dec` are [n_latents, d_model], `b_enc` [n_latents], `b_pre` [d_model]. Rows of `W_dec` have unit norm. A
    subclass may hold more tensors: their first dimension is n_latents, since ranks share them out by latents.
    """

    selects_top_k: ClassVar[bool] = False
    """Whether the active latents of a row are its k largest, where positive; otherwise those above `floor`."""
    sets_k: ClassVar[bool]
    """Whether training keeps k latents per row, at most or on average; otherwise the sparsity penalty decides how many."""
    unit_decoder: ClassVar[bool] = True
    """Whether training keeps rows of `W_dec` at unit norm in every step."""
    scalars: ClassVar[int] = 1
    """Trained numbers of a latent besides its rows of `W_enc` and `W_dec`."""
    exports: ClassVar[Mapping[str, str]]
    """What other libraries call it, by the format's name in sae.formats."""
    exported_as: ClassVar[str] = ""
    """The architecture that computes the same at inference and stands in where a format has no name for this one."""

    def __new__(cls, cfg: SAEConfig | None = None) -> "SAE":
        """Of the class that `cfg` names where SAE itself is called."""
        made: SAE = super().__new__(architecture(cfg.architecture) if cls is SAE and cfg is not None else cls)
        return made

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_enc = nn.Parameter(torch.empty(cfg.n_latents, cfg.d_model))
        self.W_dec = nn.Parameter(torch.empty(cfg.n_latents, cfg.d_model))
        self.b_enc = nn.Parameter(torch.zeros(cfg.n_latents))
        self.b_pre = nn.Parameter(torch.zeros(cfg.d_model))
        self._stored_hash: str | None = None
        self.initialise_()

    # What an architecture decides -------------------------------------------------------------------------------------

    @property
    def floor(self) -> Tensor | None:
        """[n_latents] >= 0, what a pre-activation must exceed for its latent to be active; None where `selects_top_k`."""
        return None

    def losses(
        self,
        z: Tensor,
        config: LossConfig,
        dead: Tensor | None = None,
        n_dead: int = 0,
        mesh: Mesh = ALONE,
        first: int = 0,
    ) -> Losses:
        """Loss sums of normalised rows `z` [N, d], with their graph. This SAE holds the latents of this rank, from `first` on.

        `dead` int64 are this rank's dead latents and `n_dead` those of all ranks.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, config: Hyperparameters) -> None:
        """ValueError where flags cannot go together with this architecture."""

    @classmethod
    def config_of(cls, config: Hyperparameters) -> dict[str, Any]:
        """What `SAEConfig` must hold of these flags, besides what every architecture needs."""
        return {}

    @classmethod
    def step_bytes(cls, config: Hyperparameters, share: Share) -> int:
        """Bytes at the peak of a training step beyond weights and Adam's moments; `share.rows` are the rows at a time."""
        raise NotImplementedError

    def begin_(self, config: Hyperparameters, generator: torch.Generator, first: int) -> None:
        """The weights that training starts from, but for `b_pre`."""
        norm = config.encoder_norm or best_encoder_norm(config.n_latents, config.k, self.cfg.d_model)
        self.initialise_(config.init, generator, first, config.n_latents, norm)

    @torch.no_grad()
    def constrain_(self) -> None:
        """After an optimizer step: back to where the parameters must be."""
        if self.unit_decoder:
            self.normalise_decoder_()

    def note_(self, part: Losses, step: int) -> None:
        """After training step `step` (from 0), of which `part` are the sums: what is measured rather than learned."""

    @torch.no_grad()
    def initialise_(
        self,
        how: str = "tied",
        generator: torch.Generator | None = None,
        first: int = 0,
        total: int = 0,
        encoder_norm: float = 1.0,
    ) -> None:
        """Random unit rows in `W_dec`, the same times `encoder_norm` in `W_enc` (tied as in Gao et al. 2024, A.1);
        `orthogonal`: d at a time orthogonal.

        Where this holds only some of `total` latents, from `first` on, they get the rows that they would have in the whole.
        """
        if how not in ("tied", "orthogonal"):
            raise ValueError(f"initialisation {how!r} is not known; expected tied or orthogonal")
        n, d = self.W_dec.shape
        for start in range(0, total or n, d):
            block = torch.randn(d, d, generator=generator)  # drawn even if not ours: the next one depends on it
            low, high = max(start, first), min(start + d, first + n)
            if low < high:
                basis = torch.linalg.qr(block).Q if how == "orthogonal" else block
                self.W_dec[low - first : high - first] = basis[low - start : high - start]
        self.normalise_decoder_()
        self.W_enc.copy_(self.W_dec * encoder_norm)

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Give each latent's row of `W_dec` unit norm."""
        self.W_dec.copy_(unit_rows(self.W_dec))

    @torch.no_grad()
    def fold_decoder_norms_(self) -> None:
        """Unit rows in `W_dec`, with latents that many times larger: the same function."""
        norms = row_norms(self.W_dec).to(self.W_dec.dtype)
        self.normalise_decoder_()
        self.W_enc.mul_(norms[:, None])
        self.b_enc.mul_(norms)

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take from each row's gradient in `W_dec` the part along the row, which normalisation would undo."""
        assert self.W_dec.grad is not None
        along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec, dim=1)
        self.W_dec.grad.addcmul_(self.W_dec, along[:, None], value=-1)

    def normalise(self, x: Tensor) -> Normalised:
        """Rows as the SAE sees them, in its own dtype, with what undoes the normalisation."""
        if self.cfg.norm == "layer":
            return layer_normalised(x.to(self.W_enc.dtype), self.cfg.norm_eps)
        z = self.normalised_rows(x)
        like = z[..., :1]
        return Normalised(z, torch.zeros_like(like), torch.full_like(like, self.cfg.scale))

    def normalised_rows(self, x: Tensor) -> Tensor:
        """`normalise(x).z` alone: one operation instead of four, which counts where `x` is a single token."""
        x = x.to(self.W_enc.dtype)
        if self.cfg.norm == "layer":
            return layer_normalised(x, self.cfg.norm_eps).z
        return x * self.cfg.scale if self.cfg.norm == "dataset" else x

    def pre_activations(self, z: Tensor) -> Tensor:
        """`h` [N, n_latents] of normalised rows `z` [N, d]: dense, for those who need all of it."""
        return linear(z - self.b_pre, self.W_enc, self.b_enc)

    def encoder_rows(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """`W_enc` [M, d] and `b_enc` [M] of some latents [M]: what their pre-activations are computed with."""
        return self.W_enc[latents], self.b_enc[latents]

    def select(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The active latents of pre-activations `h` [N, n_latents]: values [N, K] >= 0 in falling order, and indices [N, K]."""
        k = self.cfg.k
        floor = self.floor
        if floor is not None:
            h = h.where(h > floor, 0)
            k = max(1, int((h > 0).sum(1).max())) if len(h) else 1
        values, indices = top_k(h, k)
        return values.relu(), indices

    def values_at(self, z: Tensor, indices: Tensor, h: Tensor) -> Tensor:
        """`h` at `indices` [N, K], where `h` [N, n_latents] is that of `z` without a gradient, with its sparse gradient."""
        return encode_at((self.b_pre, self.W_enc, self.b_enc), z, indices, h)

    def encode(self, x: Tensor, h_bias: Tensor | None = None) -> Latents:
        """The active latents of raw rows `x` [..., d]; `h_bias` [n_latents] is added to `h` first, as steering may want.

        ValueError where `x` holds NaN, infinity or numbers whose squares float32 cannot sum up, or has another width.
        """
        if x.shape[-1] != self.cfg.d_model:
            raise ValueError(f"expected rows of width {self.cfg.d_model}, found {x.shape[-1]}")
        largest = float(x.float().abs().amax()) if x.numel() else 0.0
        if not largest <= LARGEST:  # NaN is the largest of all, and not below anything
            what = f"{largest:.3g}, whose square float32 cannot hold" if math.isfinite(largest) else "NaN or infinite values"
            raise ValueError(f"activations hold {what}; expected numbers up to {LARGEST:g}. Find where they come from")
        rows = self.normalise(x).z.reshape(-1, self.cfg.d_model)
        if torch.is_grad_enabled():
            step = len(rows)
        else:
            step = (CPU_ELEMENTS if rows.device.type == "cpu" else GPU_ELEMENTS) // self.cfg.n_latents
        blocks = [self._encode_block(block, h_bias) for block in torch.split(rows, max(1, step))]
        K = max(values.shape[1] for values, _ in blocks)
        values, indices = (
            torch.cat([F.pad(part, (0, K - part.shape[1])) for part in parts]).view(*x.shape[:-1], K)
            for parts in zip(*blocks, strict=True)
        )
        return Latents(values, indices)

    def _encode_block(self, z: Tensor, h_bias: Tensor | None) -> Latents:
        with torch.no_grad():
            h = self.pre_activations(z)
            if h_bias is not None:
                h += h_bias
            selected, indices = self.select(h)
        values = self.values_at(z, indices, h).relu()
        silent = selected == 0
        return Latents(values.masked_fill(silent, 0), indices.masked_fill(silent, 0))

    def decode(self, latents: Latents, norm: Normalised | None = None) -> Tensor:
        """`x_hat` [..., d]. `layer` undoes each row's own mean and scale and so needs `norm`; ValueError without it."""
        K = latents.values.shape[-1]
        flat = decode(latents.values.reshape(-1, K), latents.indices.reshape(-1, K), self.W_dec) + self.b_pre
        z_hat = flat.view(*latents.values.shape[:-1], self.cfg.d_model)
        if self.cfg.norm != "layer":
            return z_hat / self.cfg.scale
        norm = self._needed(norm)
        return z_hat / norm.scale + norm.mean

    def forward(self, x: Tensor, h_bias: Tensor | None = None) -> Tensor:
        """`x_hat` [..., d] for raw rows `x` [..., d], in their dtype; `h_bias` as in `encode`."""
        return self.decode(self.encode(x, h_bias), self.normalise(x)).to(x.dtype)

    def directions(self, latents_idx: Tensor, norm: Normalised | None = None) -> Tensor:
        """What one unit of each latent adds to `x`: [M, d]. `layer` depends on the row: it needs `norm` and gives [N, M, d]."""
        rows = self.W_dec[latents_idx]
        if self.cfg.norm != "layer":
            return rows / self.cfg.scale
        return rows / self._needed(norm).scale[..., None]

    def _needed(self, norm: Normalised | None) -> Normalised:
        if norm is None:
            raise ValueError("this SAE normalises each row by its own mean and std: give norm=sae.normalise(x)")
        return norm

    def plain(self) -> dict[str, Tensor]:
        """The tensors of the same function as `h = W_enc (z - b_pre) + b_enc` with a `threshold` or without: what other
        libraries can hold.
        """
        return self.state_dict()

    def load_plain_(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `plain` gives."""
        self.load_state_dict(tensors, assign=True)

    @property
    def weights_hash(self) -> str:
        """Identity of the SAE: xxh3-128 of its tensors' bytes in order of name; of the file it was read from, where it was."""
        return self._stored_hash or _hash_tensors(self._tensors(None))

    @property
    def site(self) -> str:
        """The hook site that it reads. ValueError where its provenance names none."""
        if site := self.cfg.provenance.get("site"):
            return str(site)
        raise ValueError("the SAE's provenance names no site; sae.adopt finds it, or give --activations to sae.convert")

    def _tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}

    def _stored(self, dtype: Storage) -> dict[str, Tensor]:
        """The tensors as they are stored in `dtype`."""
        return quantised(self._tensors(None)) if dtype == "int8" else self._tensors(dtype)

    def publish(self, builder: Builder, dtype: Storage = None) -> tuple[list[str], str]:
        """Write `sae.safetensors` and `cfg.json` into an unfinished artifact; returns their names and the weights' hash."""
        tensors = self._stored(dtype)
        builder.publish("sae.safetensors", safetensors.torch.save(tensors), rows=self.cfg.n_latents)
        builder.publish("cfg.json", (json.dumps(asdict(self.cfg), indent=1, sort_keys=True) + "\n").encode())
        return ["sae.safetensors", "cfg.json"], _hash_tensors(tensors)

    def save(self, path: Path | str, dtype: Storage = None) -> None:
        """Write the SAE as a complete folder of kind "sae", its tensors in `dtype` (None: as they are; "int8": sae.quantised).

        ValueError where the folder holds another SAE or something else.
        """
        alone = Runtime(0, 1, torch.device("cpu"), Solo())
        wanted = _hash_tensors(self._stored(dtype))
        with building(Path(path), "sae", self.cfg, alone, provenance=self.cfg.provenance | {"sae_hash": wanted}) as builder:
            if not builder.complete:
                builder.finish(self.publish(builder, dtype)[0], {"n_latents": self.cfg.n_latents})


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE in `path`, ready to use (no gradients), its weights in `dtype` on `device`.

    ValueError where the folder is incomplete or damaged, or where weights and `cfg.json` disagree.
    """
    artifact = open_artifact(Path(path), "sae")
    cfg = _read_config(artifact.file("cfg.json"))
    stored = safetensors.torch.load_file(artifact.file("sae.safetensors"))
    try:
        tensors = dequantised(stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the folder was put together wrongly") from None
    with torch.device("meta"):
        sae = SAE(cfg)
    shapes = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise ValueError(f"{path}: cfg.json asks for tensors {shapes}, found {found}; the folder was put together wrongly")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinite values; train again with a lower --lr")
    sae.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
    sae._stored_hash = _hash_tensors(stored)
    return sae.requires_grad_(False).eval()


def _read_config(path: Path) -> SAEConfig:
    try:
        values = parse_json(read_text(path))
        known = {item.name for item in fields(SAEConfig)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown key {unknown[0]!r}")
        return SAEConfig(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the configuration of an SAE ({error})") from None

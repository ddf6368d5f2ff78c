"""One step of SAE training, its state, and its schedule; the loop around it is in sae.train.

Shapes: N rows of this rank, B rows of all ranks in a step, n latents, d model width.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core.runtime import Runtime
from sae.batches import Batches, Rows, Schedule
from sae.loss import Losses, aux_weight, default_k_aux, losses
from sae.model import SAE, SAEConfig

NOT_NEGATIVE = ("max_steps", "lr", "lr_end", "warmup_steps", "eps", "weight_decay", "aux_k", "aux_coefficient", "clip_norm")
VALIDATION_ROWS = 4096  # at a time
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what Adam remembers of each parameter


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What decides the trained weights, besides the data and the seed."""

    n_latents: int = 65_536
    """Rows of W_enc and W_dec."""
    k: int = 64
    """Active latents per row, at most."""
    norm: Literal["dataset", "layer", "none"] = "dataset"
    """Normalisation of rows: by the dataset's mean norm, per row by mean and std, or none."""
    init: Literal["tied", "orthogonal"] = "tied"
    """Random unit rows, the same in encoder and decoder; orthogonal: d_model at a time orthogonal to each other."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights and products; float64 is for checks."""
    batch_size: int = 1024
    """Rows per step, all ranks together."""
    epochs: int = 1
    """Passes over the training rows."""
    max_steps: int = 0
    """Stop, and end the schedule, after so many steps; 0: after `epochs`."""
    lr: float = 0.0
    """Peak learning rate; 0: 2e-4 / sqrt(n_latents / 16,384), the scaling of Gao et al. 2024, figure 3."""
    lr_end: float = 0.0
    """Learning rate at the last step, reached along a cosine."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the gradient's mean and square."""
    eps: float = 6.25e-10
    """Adam's epsilon, on the scale of a gradient (Gao et al. 2024, A.3)."""
    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""
    aux_k: int = 0
    """Dead latents that reconstruct the error of each row; 0: the power of two nearest to d_model / 2."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss; 0: off."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead that has not fired for so many rows, seen by all ranks together."""
    clip_norm: float = 0.0
    """Largest norm of the gradient, all parameters together; 0: no clipping."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n_latents:
            raise ValueError(f"--k must be between 1 and --n-latents {self.n_latents}; found {self.k}; lower --k")
        for name in ("n_latents", "batch_size", "epochs", "dead_after_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; found {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative; found {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas must lie in [0, 1); found {self.betas}")

    @property
    def peak_lr(self) -> float:
        return self.lr or 2e-4 / math.sqrt(self.n_latents / 2**14)

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of step `step` (from 0): linear warm-up, then a cosine that ends at `lr_end` with the last step."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, total_steps - 1 - self.warmup_steps)
        return self.lr_end + (self.peak_lr - self.lr_end) * (1 + math.cos(math.pi * min(1.0, share))) / 2


class StepResult(NamedTuple):
    """What one step measured, over the rows of all ranks; the same on every rank."""

    loss: float
    aux_loss: float
    fvu: float
    l0: float
    dead_fraction: float
    lr: float
    gradient_norm: float
    stop_signal: int


class Trainer:
    """The state of a run: weights, Adam's moments, steps and rows seen, and when each latent last fired."""

    def __init__(self, config: Hyperparameters, runtime: Runtime, batches: Batches, seed: int = 0) -> None:
        self.config, self.runtime, self.batches = config, runtime, batches
        statistics = batches.statistics
        self.schedule = Schedule(len(batches.train), batches.batch_rows, config.batch_size, seed)
        all_steps = self.schedule.steps_per_epoch * config.epochs
        self.total_steps = min(config.max_steps or all_steps, all_steps)
        self.k_aux = config.aux_k or default_k_aux(statistics.d_model)
        self.total_variance = statistics.total_variance(config.norm)
        self.sae = self._new_sae(seed)
        self.optimizer = torch.optim.Adam(
            self.sae.parameters(),
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            decoupled_weight_decay=True,
            fused=True,
        )
        self.step = 0
        self.tokens = 0
        self.last_fired = torch.zeros(config.n_latents, dtype=torch.long, device=runtime.device)  # `tokens` at that time

    def _new_sae(self, seed: int) -> SAE:
        """A fresh SAE, the same on every rank, with `b_pre` at the mean of z."""
        config, statistics = self.config, self.batches.statistics
        sae = SAE(
            SAEConfig(
                d_model=statistics.d_model,
                n_latents=config.n_latents,
                k=config.k,
                norm=config.norm,
                scale=statistics.scale(config.norm),
                provenance=self.batches.provenance
                | {
                    "batches_hash": self.batches.artifact.manifest.hash,
                    "training_rows": statistics.count,
                    "mean_norm": statistics.mean_norm,
                    "total_variance": float(statistics.total_variance("none")),
                },
            )
        )
        sae.initialise_(config.init, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            sae.b_pre.copy_(statistics.mean(config.norm))
        sae.to(self.runtime.device, getattr(torch, config.dtype))
        for parameter in sae.parameters():
            self.runtime.comm.broadcast_(parameter.data)
        return sae

    def dead(self) -> Tensor:
        """The latents that are dead by now, int64 [n_dead]; the same on every rank."""
        return (self.tokens - self.last_fired >= self.config.dead_after_tokens).nonzero()[:, 0]

    def train_step(self, stop_signal: int = 0) -> StepResult:
        """One step on this rank's share of the rows. `stop_signal` of any rank is handed to all.

        ValueError on all ranks alike, before anything is changed, where loss or gradient is not finite.
        """
        config, runtime = self.config, self.runtime
        dead, n_rows = self.dead(), self.schedule.rows_in(self.step)
        local = self._backward(dead, n_rows)
        gradients = [parameter.grad for parameter in self.sae.parameters() if parameter.grad is not None]
        for gradient in gradients:
            runtime.comm.sum_(gradient)
        runtime.comm.max_(local.fired)
        sums = torch.stack([x.detach().double() for x in (local.main, local.aux, local.l0)])
        runtime.comm.sum_(sums)
        wish = runtime.comm.max_(torch.tensor(stop_signal, device=runtime.device))
        self.sae.remove_parallel_gradient_()
        norm = torch.nn.utils.get_total_norm(gradients)
        main, aux, l0, gradient_norm, stop = (*sums.tolist(), float(norm), int(wish))
        self._refuse_non_finite(main, aux, gradient_norm)
        if config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.sae.parameters(), config.clip_norm, norm)
        lr = config.lr_at(self.step, self.total_steps)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.normalise_decoder_()
        self.step += 1
        self.tokens += n_rows
        self.last_fired[local.fired > 0] = self.tokens
        d = self.sae.cfg.d_model
        fvu = main / n_rows / self.total_variance if self.total_variance else math.nan
        return StepResult(
            main / (n_rows * d), aux / (n_rows * d), fvu, l0 / n_rows, len(dead) / config.n_latents, lr, gradient_norm, stop
        )

    def _backward(self, dead: Tensor, n_rows: int) -> Losses:
        """Gradients of this rank's part of the loss; zeros where no row falls to it."""
        config, sae = self.config, self.sae
        x = self._read(self.batches.train, self.schedule.segments(self.step, self.runtime.rank, self.runtime.world_size))
        if not config.aux_coefficient:
            dead = dead[:0]
        part = losses(sae, sae.normalise(x).z, dead, self.k_aux)
        weight = aux_weight(len(dead), self.k_aux, config.aux_coefficient)
        objective = (part.main + weight * part.aux) / (n_rows * sae.cfg.d_model)
        objective.backward()  # type: ignore[no-untyped-call]
        return part

    def _read(self, rows: Rows, segments: Iterable[tuple[int, int]]) -> Tensor:
        """Rows [N, d] on the device; N may be 0."""
        parts = [rows.read(start, stop) for start, stop in segments]
        x = torch.cat(parts) if parts else torch.empty(0, self.sae.cfg.d_model)
        return x.to(self.runtime.device)

    def _refuse_non_finite(self, main: float, aux: float, gradient_norm: float) -> None:
        if not all(map(math.isfinite, (main, aux, gradient_norm))):
            raise ValueError(
                f"step {self.step + 1}: loss and gradient must be finite; found {main}, {aux} and gradient norm "
                f"{gradient_norm}. Nothing of this step was saved; lower --lr or set --clip-norm, with another --out"
            )

    @torch.no_grad()
    def validate(self, most_rows: int) -> dict[str, float]:
        """`val_loss`, `val_aux_loss` and `val_fvu` over the first `most_rows` validation rows (0: all); nothing without any."""
        rows = self.batches.validation
        n_rows = min(len(rows), most_rows or len(rows))
        if n_rows == 0:
            return {}
        runtime, d = self.runtime, self.sae.cfg.d_model
        dead = self.dead() if self.config.aux_coefficient else self.dead()[:0]
        blocks = range(0, n_rows, VALIDATION_ROWS)
        sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
        for index in runtime.share(len(blocks)):
            x = self._read(rows, [(blocks[index], min(n_rows, blocks[index] + VALIDATION_ROWS))])
            part = losses(self.sae, self.sae.normalise(x).z, dead, self.k_aux)
            sums += torch.stack((part.main, part.aux)).double()
        main, aux = (runtime.comm.sum_(sums) / n_rows).tolist()
        fvu = main / self.total_variance if self.total_variance else math.nan
        return {"val_loss": main / d, "val_aux_loss": aux / d, "val_fvu": fvu}

    def finished(self) -> SAE:
        """The SAE with the length of its training in its provenance."""
        cfg = self.sae.cfg
        provenance = cfg.provenance | {"training_steps": self.step, "training_tokens": self.tokens}
        self.sae.cfg = SAEConfig(**(vars(cfg) | {"provenance": provenance}))
        return self.sae

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as tensors on the CPU; the same on every rank."""
        tensors = {f"sae.{name}": parameter.detach() for name, parameter in self.sae.named_parameters()}
        for name, parameter in self.sae.named_parameters():
            tensors |= {f"adam.{name}.{moment}": self.optimizer.state[parameter][moment] for moment in MOMENTS}
        counters = {"step": torch.tensor(self.step), "tokens": torch.tensor(self.tokens), "last_fired": self.last_fired}
        tensors |= counters | {"rng": torch.get_rng_state()}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go back to where `state` was taken."""
        device = self.runtime.device
        with torch.no_grad():
            for name, parameter in self.sae.named_parameters():
                parameter.copy_(state[f"sae.{name}"])
                self.optimizer.state[parameter] = {m: state[f"adam.{name}.{m}"].to(device) for m in MOMENTS}
        self.step, self.tokens = int(state["step"]), int(state["tokens"])
        self.last_fired = state["last_fired"].to(device)
        torch.set_rng_state(state["rng"])

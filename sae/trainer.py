"""One step of SAE training and the state of a run; the loop around it is in sae.train.

Shapes: N rows of this rank, B rows of all ranks in a step, n latents of this rank, d model width.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from core.runtime import Mesh, Runtime, Solo
from sae.architectures import architecture
from sae.hyperparameters import Hyperparameters as Hyperparameters
from sae.loss import LossConfig, Losses
from sae.model import SAE, SAEConfig
from sae.optimizer_step import optimizer_step
from sae.rows import Source

VALIDATION_ROWS = 4096  # at a time
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam remembers of each entry
FINGERPRINT_ROWS = 4096  # at a time
SINCE_FIRED_EDGES = tuple(10**e for e in range(3, 11))
DENSITY_EDGES = tuple(10.0**e for e in range(-7, 0))


class NotFinite(ValueError):
    """A loss or gradient that is not; raised on all ranks alike, before anything is changed."""


class StepResult(NamedTuple):
    """What one step measured, over the rows and latents of all ranks; the same on every rank."""

    loss: float
    aux_loss: float
    penalty: float
    fvu: float
    l0: float
    dead_fraction: float
    lr: float
    gradient_norm: Tensor
    """Left on the device: the step ends without waiting for it."""
    stop_signal: int
    busy: bool


class State(NamedTuple):
    """Everything that the next step depends on, on the CPU: what all ranks hold, and what belongs to this rank's latents."""

    shared: dict[str, Tensor]
    latents: dict[str, Tensor]


class Trainer:
    """The state of a run: weights, Adam's moments, steps and rows seen, and when each latent last fired.

    `latent_parallel` ranks at a time share rows and hold `n_latents / latent_parallel` latents each, from `first` on; groups
    of them share out the rows. `begin_with` is an SAE whose weights to begin with.
    """

    def __init__(
        self,
        config: Hyperparameters,
        runtime: Runtime,
        source: Source,
        seed: int = 0,
        latent_parallel: int = 1,
        begin_with: SAE | None = None,
    ) -> None:
        if config.n_latents % latent_parallel:
            raise ValueError(f"--latent-parallel {latent_parallel} must divide --n-latents {config.n_latents}")
        self.config, self.runtime, self.source = config, runtime, source
        self.mesh = runtime.mesh(latent_parallel)
        statistics = source.statistics
        statistics.refuse_constant(config.norm)
        self.rows = source.reader(config, self.mesh.data, runtime.device)
        self.total_steps = self.rows.total_steps
        self.total_variance = statistics.total_variance(config.norm)
        self.n_local = config.n_latents // latent_parallel
        self.first = self.mesh.latent.rank * self.n_local
        self.sae = self._new_sae(seed, begin_with)
        self.optimizer = torch.optim.Adam(
            self.sae.parameters(),
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            decoupled_weight_decay=True,
            fused=True,
        )
        self.optimizer_step = optimizer_step(config, self.sae, self.optimizer, self.mesh, self.first)
        device = runtime.device
        self.step = 0
        self.position: dict[str, Tensor] = {}
        """Where the rows of `step` are, as a checkpoint says it."""
        self.tokens = 0
        self.last_fired = torch.zeros(self.n_local, dtype=torch.long, device=device)  # `tokens` at that time
        self.fired_in_window = torch.zeros_like(self.last_fired)  # rows, since `window_began`
        self.window_began = 0  # `tokens` at the last line of metrics
        self.lowest_val_loss, self.validations_above = math.inf, 0

    def _new_sae(self, seed: int, begin_with: SAE | None) -> SAE:
        """This rank's latents of a fresh SAE, or of `begin_with`; `b_pre` starts at a centre of z."""
        config, statistics = self.config, self.source.statistics
        sae = SAE(
            SAEConfig(
                d_model=statistics.d_model,
                n_latents=self.n_local,
                k=min(config.k, self.n_local),
                architecture=config.architecture,
                norm=config.norm,
                scale=statistics.scale(config.norm),
                provenance=self.source.provenance
                | self.source.trained_on
                | {
                    "mean_norm": statistics.mean_norm,
                    "total_variance": float(statistics.total_variance("none")),
                },
                **architecture(config.architecture).config_of(config),
            )
        )
        with torch.no_grad():
            if begin_with is None:
                sae.begin_(config, torch.Generator().manual_seed(seed), self.first)
                sae.b_pre.copy_(statistics.centre(config.norm, config.b_pre))
            else:
                _check_alike(begin_with.cfg, replace(sae.cfg, n_latents=config.n_latents, k=config.k))
                for name, tensor in sae.state_dict().items():
                    whole = begin_with.state_dict()[name]
                    tensor.copy_(whole if name == "b_pre" else whole[self.first : self.first + self.n_local])
        return sae.to(self.runtime.device, getattr(torch, config.dtype))

    def dead(self) -> Tensor:
        """This rank's latents that are dead by now, int64 [n_dead]."""
        return (self.tokens - self.last_fired >= self.config.dead_after_tokens).nonzero()[:, 0]

    def train_step(self, stop_signal: int = 0, busy: bool = False) -> StepResult:
        """One step on this rank's share of the rows. `stop_signal` and `busy` of any rank are handed to all.

        NotFinite where the loss or its gradient is not.
        """
        config, d = self.config, self.sae.cfg.d_model
        dead, n_rows = self.dead(), self.rows.rows_in(self.step)
        n_dead = self._over_latents(len(dead))
        part = self._add_gradients(dead, n_dead, n_rows)
        fired = self.mesh.data.sum_(part.fired)
        main, aux, penalty, l0 = self._refuse_non_finite(part)
        wishes = self.runtime.comm.max_(torch.tensor([stop_signal, int(busy)], device=self.runtime.device)).tolist()
        lr = config.lr_at(self.step, self.total_steps)
        gradient_norm = self.optimizer_step.update(lr)
        self.sae.note_(part._replace(threshold=part.threshold / config.accumulate), self.step)
        self.step += 1
        self.tokens += n_rows
        self.last_fired[fired > 0] = self.tokens
        self.fired_in_window += fired
        return StepResult(
            loss=main / (n_rows * d),
            aux_loss=aux / (n_rows * d),
            penalty=penalty / n_rows,
            fvu=main / n_rows / self.total_variance,
            l0=l0 / n_rows,
            dead_fraction=n_dead / config.n_latents,
            lr=lr,
            gradient_norm=gradient_norm,
            stop_signal=wishes[0],
            busy=bool(wishes[1]),
        )

    def _add_gradients(self, dead: Tensor, n_dead: int, n_rows: int) -> Losses:
        """Gradients of this rank's part of the loss, and its sums; zeros where no row falls to it."""
        config, sae = self.config, self.sae
        x = self.rows.take(self.step)
        loss_config = LossConfig.at(config, self.step, sae.cfg.d_model, self.runtime.device)
        scale = 1 / (n_rows * sae.cfg.d_model)
        parts = [
            self.optimizer_step.add(sae.normalise(rows).z, loss_config, scale, dead, n_dead)
            for rows in x.tensor_split(config.accumulate)
        ]
        return Losses(*(torch.stack(values).sum(0, dtype=values[0].dtype) for values in zip(*parts, strict=True)))

    def _over_latents(self, count: int) -> int:
        """Sum of `count` over the ranks that share rows."""
        return int(self.mesh.latent.sum_(torch.tensor(count, device=self.runtime.device)))

    def _refuse_non_finite(self, part: Losses) -> list[float]:
        """Sums over all rows and latents: main, aux, penalty, L0. NotFinite on all ranks where one of them or a gradient is not
        finite.
        """
        counted = self.mesh.latent.rank == 0  # ranks that share rows have the same reconstruction
        values = [part.main * counted, part.aux * counted, part.penalty, part.l0, ~self.optimizer_step.finite()]
        *sums, n_bad = self.runtime.comm.sum_(torch.stack([value.double() for value in values])).tolist()
        if n_bad or not all(map(math.isfinite, sums)):
            gradients = f"gradients that are not finite on {n_bad:g} ranks" if n_bad else "finite gradients"
            raise NotFinite(
                f"step {self.step + 1}: loss and gradient must be finite; found loss sums {sums[0]}, {sums[1] + sums[2]} and "
                f"{gradients}. Nothing of this step was saved; lower --lr or set --clip-norm, with another --out"
            )
        return sums

    @torch.no_grad()
    def validate(self, most_rows: int) -> dict[str, float]:
        """`val_loss`, `val_aux_loss` and `val_fvu` over the first `most_rows` validation rows (0: all); nothing without any."""
        rows = self.source.validation
        n_rows = min(len(rows), most_rows or len(rows))
        if n_rows == 0:
            return {}
        (data, latent), d = self.mesh, self.sae.cfg.d_model
        loss_config, dead = LossConfig.at(self.config, self.step, d, self.runtime.device), self.dead()
        n_dead = self._over_latents(len(dead))
        sums = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        for start in range(data.rank * VALIDATION_ROWS, n_rows, data.size * VALIDATION_ROWS):
            x = rows.read(start, min(n_rows, start + VALIDATION_ROWS)).to(self.runtime.device)
            part = self.sae.losses(self.sae.normalise(x).z, loss_config, dead, n_dead, Mesh(Solo(), latent), self.first)
            sums += torch.stack((part.main, part.aux)).double()
        main, aux = (data.sum_(sums) / n_rows).tolist()
        fvu = main / self.total_variance
        return {"val_loss": main / d, "val_aux_loss": aux / d, "val_fvu": fvu}

    def out_of_patience(self, val_loss: float) -> bool:
        """Take note of a validation; whether `patience` of them in a row brought no new lowest loss."""
        self.validations_above = 0 if val_loss < self.lowest_val_loss else self.validations_above + 1
        self.lowest_val_loss = min(val_loss, self.lowest_val_loss)
        return 0 < self.config.patience <= self.validations_above

    def firing_histograms(self) -> dict[str, list[int]]:
        """How many latents last fired less than 10^3, 10^4, ..., 10^10 rows ago, and longer; and how many fired at less than
        10^-7, 10^-6, ..., 10^-1 of the rows since this was last asked, and more.
        """
        since = self.tokens - self.last_fired
        density = self.fired_in_window.double() / max(1, self.tokens - self.window_began)
        found = {}
        for name, values, edges in (
            ("since_fired_histogram", since, torch.tensor(SINCE_FIRED_EDGES)),
            ("density_histogram", density, torch.tensor(DENSITY_EDGES, dtype=torch.float64)),
        ):
            bins = torch.bucketize(values, edges.to(values.device), right=True)
            found[name] = self.mesh.latent.sum_(torch.bincount(bins, minlength=len(edges) + 1)).tolist()
        self.fired_in_window.zero_()
        self.window_began = self.tokens
        return found

    def check_replicas(self) -> None:
        """ValueError naming the ranks where parameters that must be equal to the bit are not."""
        mine = {name: fingerprint(parameter.detach()) for name, parameter in self.sae.named_parameters()}
        shared = mine.pop("b_pre")
        seen = self.runtime.gather_objects((self.mesh.latent.rank, shared, mine))
        first_seen: dict[int, object] = {}
        wrong = [
            rank
            for rank, (owner, b_pre, rest) in enumerate(seen)
            if b_pre != seen[0][1] or rest != first_seen.setdefault(owner, rest)
        ]
        if wrong:
            raise ValueError(
                f"step {self.step}: parameters on rank(s) {', '.join(map(str, wrong))} differ from those of the ranks with "
                "the same latents; nothing was saved since. Check the hardware and the versions on every node, then continue"
            )

    def whole(self, l0: float) -> SAE:
        """The trained SAE with all latents, on the CPU; all ranks call it. Its decoder rows have unit norm in any case.

        `l0` is what the last steps measured: for architectures that do not set it, their k.
        """
        config, cfg, group = self.config, self.sae.cfg, self.mesh.latent
        k = config.k if self.sae.sets_k else min(config.n_latents, max(1, round(l0)))
        provenance = cfg.provenance | {"training_steps": self.step, "training_tokens": self.tokens}
        with torch.device("meta"):
            sae = SAE(replace(cfg, n_latents=config.n_latents, k=k, provenance=provenance))
        tensors = {}
        for name, tensor in self.sae.state_dict().items():
            gathered = tensor if name == "b_pre" else group.all_gather(tensor).flatten(0, 1)
            tensors[name] = gathered.detach().cpu().clone()
        sae.load_state_dict(tensors, assign=True)
        if not sae.unit_decoder:
            sae.fold_decoder_norms_()
        return sae

    def state(self) -> State:
        """A copy: later steps do not change it."""
        shared = {
            "step": torch.tensor(self.step),
            "tokens": torch.tensor(self.tokens),
            "window_began": torch.tensor(self.window_began),
            "lowest_val_loss": torch.tensor(self.lowest_val_loss, dtype=torch.float64),
            "validations_above": torch.tensor(self.validations_above),
        } | self.rows.position(self.step)
        latents = {"last_fired": self.last_fired, "fired_in_window": self.fired_in_window}
        for name, tensor in self.sae.state_dict().items():
            (shared if name == "b_pre" else latents)[f"sae.{name}"] = tensor.detach()
        for name, parameter in self.sae.named_parameters():
            adam = self.optimizer.state[parameter]
            shared[f"adam.{name}.step"] = adam["step"]
            for moment in MOMENTS:
                (shared if name == "b_pre" else latents)[f"adam.{name}.{moment}"] = adam[moment]
        copies = [{name: tensor.cpu().clone() for name, tensor in part.items()} for part in (shared, latents)]
        return State(*copies)

    def load_state(self, state: State) -> None:
        """Go back to where `state` was taken; its latents are those of this rank, wherever they were before."""
        device = self.runtime.device
        tensors = {name: tensor.to(device) for part in state for name, tensor in part.items()}
        with torch.no_grad():
            for name, tensor in self.sae.state_dict().items():
                tensor.copy_(tensors[f"sae.{name}"])
        for name, parameter in self.sae.named_parameters():
            self.optimizer.state[parameter] = {m: tensors[f"adam.{name}.{m}"] for m in ("step", *MOMENTS)}
        self.step, self.tokens, self.window_began = (int(tensors[name]) for name in ("step", "tokens", "window_began"))
        self.lowest_val_loss, self.validations_above = float(tensors["lowest_val_loss"]), int(tensors["validations_above"])
        self.last_fired, self.fired_in_window = tensors["last_fired"], tensors["fired_in_window"]
        self.position = state.shared


def _check_alike(given: SAEConfig, wanted: SAEConfig) -> None:
    for name in ("d_model", "n_latents", "norm", "architecture", "prefixes"):
        if getattr(given, name) != getattr(wanted, name):
            raise ValueError(f"--init-from: has {name} {getattr(given, name)}, but this run needs {getattr(wanted, name)}")


def fingerprint(tensor: Tensor) -> int:
    """A number that differs where any bit of `tensor` does, but for one case in about 2^64: sum of its 32-bit words, each times
    an odd number of its own, modulo 2^64.
    """
    total = 0
    for start, rows in enumerate(torch.split(tensor, FINGERPRINT_ROWS)):
        words = rows.contiguous().view(torch.int32).flatten().long()
        factors = torch.arange(len(words), device=tensor.device).mul_(2).add_(1)
        total += (start + 1) * int((words * factors).sum())
    return total % 2**64

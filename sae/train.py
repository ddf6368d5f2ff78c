"""Batches -> a trained SAE.

    python -m sae.train --batches batches/ --out run/ --n-latents 4096 --k 32
    torchrun --nproc_per_node=8 -m sae.train --batches batches/ --out run/ --n-latents 65536 --k 64

    torchrun --nproc_per_node=8 -m sae.train --batches batches/ --out run/ --n-latents 1048576 --k 32 --latent-parallel 8

Ranks share out the rows of every batch (data parallel), the latents (--latent-parallel), or both. SIGTERM or Ctrl-C: one
checkpoint of the current step, then exit; the same command continues from the newest complete checkpoint, bit for bit.
`metrics.jsonl` holds, per line: `loss` = mean (z - z_hat)^2, `aux_loss` = mean (e - e_hat)^2 and `penalty`, both unweighted,
`fvu` = loss over the variance of z in all training rows, `l0`, `dead_fraction`, `lr`, `gradient_norm`, `since_fired_histogram`
and `density_histogram` (see Trainer.firing_histograms), `activations_per_s` of all ranks, `floor_share`, and `val_...`.
"""

import contextlib
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import files
from core.artifact import building, config_record, open_artifact
from core.cli import Progress, StageConfig, machine, run_stage
from core.product import linear
from core.runtime import Runtime
from sae.batches import Batches
from sae.checkpoint import Checkpoints, StopWish, stop_signals
from sae.hyperparameters import Hyperparameters
from sae.loss import LossConfig
from sae.metrics import Metrics, NoMetrics
from sae.model import load
from sae.trainer import NotFinite, StepResult, Trainer
from sae.wandb import Wandb, WandbMode, wanted

log = logging.getLogger("sae.train")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig, Hyperparameters):
    """Flags of the stage."""

    batches: Path
    """Folder written by sae.preprocess."""
    out: Path
    """The run's folder: sae/, checkpoints/, metrics.jsonl."""
    log_every: int = machine(10)
    """Steps between lines of metrics.jsonl."""
    validate_every: int = machine(0)
    """Steps between validations; 0: at the end alone."""
    validate_rows: int = machine(65_536)
    """Validation rows used, at most; 0: all."""
    checkpoint_every: int = machine(1000)
    """Steps between checkpoints; 0: only when asked to stop."""
    keep: int = machine(2)
    """Complete checkpoints kept."""
    check_every: int = machine(1000)
    """Steps between checks that ranks which should hold equal parameters do; 0: at the start and the end alone."""
    latent_parallel: int = machine(1)
    """Ranks that share out the latents; as many groups of them as there are share out the rows. See docs/scaling.md."""
    init_from: Path | None = None
    """Folder of an SAE (run/sae) whose weights to begin with."""
    plan: bool = machine(False)
    """Only say what the run would need: memory, disk, time."""
    wandb: WandbMode = machine("auto")
    """Weights & Biases: auto, off, offline, online. auto is what WANDB_DISABLED or WANDB_MODE says, else online where
    WANDB_API_KEY is set, else offline. A process of its own makes the copy, so that no server delays training; WANDB_PROJECT,
    WANDB_NAME and the other WANDB_ variables hold."""

    def __post_init__(self) -> None:
        Hyperparameters.__post_init__(self)
        if self.keep < 1 or self.log_every < 1:
            raise ValueError(f"--keep and --log-every must be at least 1; found {self.keep} and {self.log_every}")
        if min(self.validate_every, self.validate_rows, self.checkpoint_every, self.check_every) < 0:
            raise ValueError("--validate-every, --validate-rows, --checkpoint-every and --check-every must not be negative")
        if self.patience and not self.validate_every:
            raise ValueError(f"--patience {self.patience} needs --validate-every, which is 0")


def run(config: TrainConfig, runtime: Runtime) -> None:
    """Train, or continue training, and write the run's folder."""
    batches = Batches(config.batches)
    if len(batches.train) < config.batch_size:
        raise ValueError(
            f"{config.batches}: holds {len(batches.train):,} training rows, fewer than one batch of --batch-size "
            f"{config.batch_size:,}; capture more text, or lower --batch-size"
        )
    if config.plan:
        from sae.plan import plan  # for those who ask

        needs = plan(config, batches, runtime, config.latent_parallel, config.out, config.keep)
        if runtime.is_main:
            print(needs.text())
        return
    inputs, begin_with = [batches.artifact], None
    if config.init_from:
        inputs.append(open_artifact(config.init_from, "sae"))
        begin_with = load(config.init_from, dtype=getattr(torch, config.dtype))
    with contextlib.ExitStack() as at_last:  # a copy for looking at may take a moment, when the SAE lies on the disk
        with building(config.out / "sae", "sae", config, runtime, inputs, batches.provenance) as builder:
            if builder.complete:
                log.info("%s: already complete", config.out)
                return
            trainer = Trainer(config, runtime, batches, config.seed, config.latent_parallel, begin_with)
            checkpoints = Checkpoints(config.out / "checkpoints", config.keep, config, runtime, trainer.mesh)
            state = checkpoints.newest(trainer.first, trainer.n_local)
            if state is not None:
                trainer.load_state(state)
                log.info("continuing behind step %s of %s", f"{trainer.step:,}", f"{trainer.total_steps:,}")
            trainer.check_replicas()
            metrics = _open_metrics(config, runtime, trainer.step)
            at_last.callback(metrics.close)
            with contextlib.closing(checkpoints), stop_signals() as wish:
                line = _fit(config, runtime, trainer, checkpoints, metrics, wish)
            sae = trainer.whole(line["l0"])
            names, sae_hash = sae.publish(builder) if runtime.is_main else ([], "")
            counts = {"n_latents": config.n_latents, "steps": trainer.step, "tokens": trainer.tokens}
            builder.finish(names, counts, sae.cfg.provenance | {"sae_hash": sae_hash})
        log.info(
            "%s: %s latents after %s steps and %s tokens, fvu %.4f, l0 %.1f, dead %.2f %%",
            config.out / "sae", f"{config.n_latents:,}", f"{trainer.step:,}", f"{trainer.tokens:,}",
            line.get("val_fvu", line["fvu"]), line["l0"], 100 * line["dead_fraction"],
        )  # fmt: skip


def _open_metrics(config: TrainConfig, runtime: Runtime, step: int) -> Metrics | NoMetrics:
    if not runtime.is_main:
        return NoMetrics()
    files.make_folder(config.out)
    metrics = Metrics(config.out / "metrics.jsonl", step)
    if (mode := wanted(config.wandb)) != "off":
        metrics.copy_to(Wandb(config.out, mode, config_record(config), step))
    return metrics


def _fit(
    config: TrainConfig,
    runtime: Runtime,
    trainer: Trainer,
    checkpoints: Checkpoints,
    metrics: Metrics | NoMetrics,
    wish: StopWish,
) -> dict[str, Any]:
    """All steps that are left; returns the last line of metrics. SystemExit after a checkpoint where a signal asked to stop."""
    line: dict[str, Any] = {"fvu": math.nan, "l0": math.nan, "dead_fraction": math.nan}
    clock = Clock(trainer)
    with Progress("training", trainer.total_steps - trainer.step, "steps", runtime) as bar:
        while trainer.step < trainer.total_steps:
            try:
                result = trainer.train_step(wish.signal, checkpoints.busy)
            except NotFinite:
                checkpoints.finish()  # what is being written is good
                raise
            last = trainer.step == trainer.total_steps
            bar.update(1, fvu=f"{result.fvu:.4f}", dead=f"{result.dead_fraction:.1%}")
            if validated := last or _due(trainer.step, config.validate_every):
                validation = trainer.validate(config.validate_rows)
                last = last or (bool(validation) and trainer.out_of_patience(validation["val_loss"]))
            if validated or _due(trainer.step, config.log_every):
                line = _line(trainer, result) | clock.rates(trainer) | (validation if validated else {})
                metrics.write(line)
            if _due(trainer.step, config.check_every) or last:
                trainer.check_replicas()
            if checkpoints.pending and (not result.busy or result.stop_signal or last):
                checkpoints.finish()
            if last:
                break
            if result.stop_signal or _due(trainer.step, config.checkpoint_every):
                checkpoints.finish()
                checkpoints.begin(trainer.step, trainer.state())
            if result.stop_signal:
                checkpoints.finish()
                log.warning("asked to stop: checkpoint of step %s written; the same command continues", f"{trainer.step:,}")
                raise SystemExit(128 + result.stop_signal)
    return line


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _line(trainer: Trainer, result: StepResult) -> dict[str, Any]:
    """A line of metrics.jsonl, but for what the clock says."""
    measured = result._asdict()
    return (
        {"step": trainer.step, "tokens": trainer.tokens}
        | {name: float(measured[name]) for name in measured if name not in ("stop_signal", "busy")}
        | trainer.firing_histograms()
    )


class Clock:
    """Rows per second since it was made, or last read, and the share of the step that its dense floor would take."""

    def __init__(self, trainer: Trainer) -> None:
        self._floor = floor_seconds(trainer)  # a row's
        self._tokens, self._since = trainer.tokens, time.monotonic()

    def rates(self, trainer: Trainer) -> dict[str, float]:
        """`activations_per_s` of all ranks, and `floor_share`: the encoder's forward product alone, as measured at the start,
        over the whole step. Validation and what else happened in between counts as time spent.
        """
        now = time.monotonic()
        rate = (trainer.tokens - self._tokens) / max(now - self._since, 1e-9)
        self._tokens, self._since = trainer.tokens, now
        return {"activations_per_s": round(rate, 1), "floor_share": round(rate * self._floor, 4)}


@torch.no_grad()
def floor_seconds(trainer: Trainer) -> float:
    """Seconds per row of a step, all ranks at work, for the encoder's product alone: the best of three on this rank's share of
    a step, cut into the parts that training cuts it into, in the type that it multiplies.
    """
    config, data, device = trainer.config, trainer.mesh.data, trainer.runtime.device
    n_rows = -(-config.batch_size // data.size // config.accumulate)
    d = trainer.sae.cfg.d_model
    W_enc = trainer.sae.W_enc.to(LossConfig.at(config, 0, d, device).products or trainer.sae.W_enc.dtype)
    z = torch.ones(n_rows, d, dtype=W_enc.dtype, device=device)
    times = []
    for _ in range(3):
        began = _now(device)
        linear(z, W_enc)
        times.append(_now(device) - began)
    return min(times) / (n_rows * data.size)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


if __name__ == "__main__":
    run_stage(TrainConfig, run, __doc__ or "")

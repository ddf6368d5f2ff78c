"""Batches -> a trained SAE.

    python -m sae.train --batches batches/ --out run/ --n-latents 4096 --k 32
    torchrun --nproc_per_node=8 -m sae.train --batches batches/ --out run/ --n-latents 65536 --k 64

Data parallel: each rank takes its share of every batch, and gradients are summed over ranks explicitly. SIGTERM or Ctrl-C: one
checkpoint of the current step, then exit; the same command continues from the newest complete checkpoint, bit for bit.
`metrics.jsonl` holds, per line: `loss` = mean (z - z_hat)^2, `aux_loss` = mean (e - e_hat)^2 (unweighted), `fvu` = loss over
the variance of z in all training rows, `l0`, `dead_fraction`, `lr`, `activations_per_s` of all ranks, and `val_...`.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import files
from core.artifact import building, config_record
from core.cli import Progress, StageConfig, machine, run_stage
from core.runtime import Runtime
from sae.batches import Batches
from sae.checkpoint import StopWish, newest_checkpoint, remove_old_checkpoints, stop_signals, write_checkpoint
from sae.metrics import Metrics, NoMetrics, NoWandb, Wandb, WandbMode
from sae.trainer import Hyperparameters, StepResult, Trainer

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
    wandb: WandbMode = machine("auto")
    """Weights & Biases: auto (online where WANDB_API_KEY is set, else offline), off, offline, online."""

    def __post_init__(self) -> None:
        Hyperparameters.__post_init__(self)
        if self.keep < 1 or self.log_every < 1:
            raise ValueError(f"--keep and --log-every must be at least 1; found {self.keep} and {self.log_every}")
        if min(self.validate_every, self.validate_rows, self.checkpoint_every) < 0:
            raise ValueError("--validate-every, --validate-rows and --checkpoint-every must not be negative; 0 has a meaning")


def run(config: TrainConfig, runtime: Runtime) -> None:
    """Train, or continue training, and write the run's folder."""
    batches = Batches(config.batches)
    if len(batches.train) < config.batch_size:
        raise ValueError(
            f"{config.batches}: holds {len(batches.train):,} training rows, fewer than one batch of --batch-size "
            f"{config.batch_size:,}; capture more text, or lower --batch-size"
        )
    inputs, provenance = [batches.artifact], batches.provenance
    with building(config.out / "sae", "sae", config, runtime, inputs, provenance) as builder:
        if builder.complete:
            log.info("%s: already complete", config.out)
            return
        trainer = Trainer(config, runtime, batches)
        state = newest_checkpoint(config.out / "checkpoints", runtime)
        if state is not None:
            trainer.load_state(state)
            log.info("continuing behind step %s of %s", f"{trainer.step:,}", f"{trainer.total_steps:,}")
        metrics = _open_metrics(config, runtime, trainer.step)
        try:
            with stop_signals() as wish:
                line = _fit(config, runtime, trainer, metrics, wish)
        finally:
            metrics.close()
        sae = trainer.finished()
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
    wandb = NoWandb() if config.wandb == "off" else Wandb(config.out, config.wandb, config_record(config))
    return Metrics(config.out / "metrics.jsonl", step, wandb)


def _fit(
    config: TrainConfig, runtime: Runtime, trainer: Trainer, metrics: Metrics | NoMetrics, wish: StopWish
) -> dict[str, Any]:
    """All steps that are left; returns the last line of metrics. SystemExit after a checkpoint where a signal asked to stop."""
    checkpoints = config.out / "checkpoints"
    line: dict[str, Any] = {"fvu": math.nan, "l0": math.nan, "dead_fraction": math.nan}
    clock = _Clock(trainer.tokens)
    with Progress("training", trainer.total_steps - trainer.step, "steps", runtime) as bar:
        while trainer.step < trainer.total_steps:
            result = trainer.train_step(wish.signal)
            last = trainer.step == trainer.total_steps
            bar.update(1, fvu=f"{result.fvu:.4f}", dead=f"{result.dead_fraction:.1%}")
            validated = last or _due(trainer.step, config.validate_every)
            if validated or _due(trainer.step, config.log_every):
                line = _line(trainer, result) | {"activations_per_s": clock.rate(trainer.tokens)}
                if validated:
                    line |= trainer.validate(config.validate_rows)
                    clock = _Clock(trainer.tokens)
                metrics.write(line)
            stop = result.stop_signal if not last else 0
            if stop or (_due(trainer.step, config.checkpoint_every) and not last):
                write_checkpoint(checkpoints, trainer.step, trainer.state(), config, runtime)
                if runtime.is_main:
                    remove_old_checkpoints(checkpoints, config.keep)
            if stop:
                log.warning("asked to stop: checkpoint of step %s written; the same command continues", f"{trainer.step:,}")
                raise SystemExit(128 + stop)
    return line


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _line(trainer: Trainer, result: StepResult) -> dict[str, Any]:
    return {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "loss": result.loss,
        "aux_loss": result.aux_loss,
        "fvu": result.fvu,
        "l0": result.l0,
        "dead_fraction": result.dead_fraction,
        "lr": result.lr,
        "gradient_norm": result.gradient_norm,
    }


class _Clock:
    """Rows per second since it was made, or last read."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._since = tokens, time.monotonic()

    def rate(self, tokens: int) -> float:
        now = time.monotonic()
        rate = (tokens - self._tokens) / max(now - self._since, 1e-9)
        self._tokens, self._since = tokens, now
        return round(rate, 1)


if __name__ == "__main__":
    run_stage(TrainConfig, run, __doc__ or "")

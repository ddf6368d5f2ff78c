"""The loop of training: one SAE, or several that learn from the same rows, step by step together.

Each run writes its own `checkpoints/`, `metrics.jsonl` and `sae/`, to the bytes that it would have
written alone.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import files
from core.artifact import Artifact, Builder, building, config_record
from core.cli import Progress, StageConfig, machine
from core.product import linear
from core.runtime import Runtime
from sae.checkpoint import Checkpoints, stop_signals
from sae.hyperparameters import Hyperparameters
from sae.loss import LossConfig
from sae.metrics import Metrics, NoMetrics
from sae.model import SAE
from sae.rows import Source
from sae.trainer import NotFinite, StepResult, Trainer
from sae.wandb import Wandb, WandbMode, wanted

log = logging.getLogger("sae.train")


@dataclass(frozen=True, kw_only=True)
class FitConfig(StageConfig, Hyperparameters):
    """Flags of a run, wherever its rows come from."""

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


class Run:
    """One SAE on its way: its trainer, and what it writes."""

    def __init__(
        self,
        config: FitConfig,
        runtime: Runtime,
        trainer: Trainer,
        builder: Builder,
    ) -> None:
        self.config, self.trainer, self.builder = config, trainer, builder
        folder = config.out / "checkpoints"
        self.checkpoints = Checkpoints(folder, config.keep, config, runtime, trainer.mesh)
        state = self.checkpoints.newest(trainer.first, trainer.n_local)
        if state is not None:
            trainer.load_state(state)
            step, total = f"{trainer.step:,}", f"{trainer.total_steps:,}"
            log.info("%s: continuing after step %s of %s", config.out, step, total)
        trainer.check_replicas()
        if runtime.is_main and (said := config.never_reached(trainer.total_steps)):
            log.warning("%s: %s", config.out, said)
        if runtime.is_main:
            builder.claim()  # checkpoints and metrics lie beside the folder
        self.metrics = _open_metrics(config, runtime, trainer.step)
        self.line: dict[str, Any] = {"fvu": math.nan, "l0": math.nan, "dead_fraction": math.nan}
        """The last line of metrics."""
        self.done, self.failure = False, ""
        self._saved = trainer.step
        self._clock: Clock | None = None

    def step(self, stop_signal: int) -> StepResult:
        """One step, with what is due after it; `stop_signal` of any rank is handed to all."""
        config, trainer, checkpoints = self.config, self.trainer, self.checkpoints
        self._clock = self._clock or Clock(trainer)
        try:
            result = trainer.train_step(stop_signal, checkpoints.busy)
        except NotFinite:
            checkpoints.finish()  # what is being written is good
            raise
        last = trainer.step == trainer.total_steps
        validation: dict[str, float] = {}
        if validated := last or _due(trainer.step, config.validate_every):
            validation = trainer.validate(config.validate_rows)
            last = last or (bool(validation) and trainer.out_of_patience(validation["val_loss"]))
        if validated or _due(trainer.step, config.log_every):
            self.line = _line(trainer, result) | self._clock.rates(trainer) | validation
            self.metrics.write(self.line)
        if _due(trainer.step, config.check_every) or last:
            trainer.check_replicas()
        if checkpoints.pending and (not result.busy or last):
            checkpoints.finish()
        self.done = last
        if not last and _due(trainer.step, config.checkpoint_every):
            self.save()
        return result

    def save(self) -> None:
        """Start to write a checkpoint of this step, if there is none."""
        if self.trainer.step != self._saved:
            self.checkpoints.finish()
            self.checkpoints.begin(self.trainer.step, self.trainer.state())
            self._saved = self.trainer.step

    def publish(self) -> None:
        """Write `sae/`; all ranks call it."""
        trainer, config, line = self.trainer, self.config, self.line
        sae = trainer.whole(line["l0"])
        names, sae_hash = sae.publish(self.builder) if trainer.runtime.is_main else ([], "")
        counts = {
            "n_latents": config.n_latents,
            "steps": trainer.step,
            "tokens": trainer.tokens,
        }
        self.builder.finish(names, counts, sae.cfg.provenance | {"sae_hash": sae_hash})
        log.info(
            "%s: %s latents after %s steps and %s tokens, fvu %.4f, l0 %.1f, dead %.2f %%",
            config.out / "sae", f"{config.n_latents:,}", f"{trainer.step:,}",
            f"{trainer.tokens:,}", line.get("val_fvu", line["fvu"]), line["l0"],
            100 * line["dead_fraction"],
        )  # fmt: skip


class Pass:
    """Runs that go over their rows together. A context: folders are locked until its end."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self.runs = runtime, list[Run]()
        # A copy for looking at may take a moment, when the SAE lies on the disk: it ends last.
        self._copies, self._held = contextlib.ExitStack(), contextlib.ExitStack()

    def __enter__(self) -> "Pass":
        self._copies.__enter__()
        self._held.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._copies:
            self._held.__exit__(*error)

    def reserve(self, config: FitConfig, provenance: dict[str, Any], inputs: Sequence[Artifact]) -> Builder | None:
        """Lock the folder of a run; None where it is complete."""
        folder = config.out / "sae"
        held = building(folder, "sae", config, self._runtime, inputs, provenance)
        builder = self._held.enter_context(held)
        if builder.complete:
            log.info("%s: already complete", config.out)
            return None
        return builder

    def add(
        self,
        config: FitConfig,
        source: Source,
        builder: Builder,
        begin_with: SAE | None,
    ) -> None:
        """A run, from its newest checkpoint on."""
        trainer = Trainer(config, self._runtime, source, config.seed, config.latent_parallel, begin_with)
        run = Run(config, self._runtime, trainer, builder)
        self._copies.callback(run.metrics.close)
        self._held.enter_context(contextlib.closing(run.checkpoints))
        self.runs.append(run)

    def train(self) -> None:
        """All steps that are left. SystemExit after a checkpoint where a signal asked to stop.

        A run whose loss is not finite ends; once the others are through, NotFinite is raised.
        """
        self._seek()
        left = max((run.trainer.total_steps - run.trainer.step for run in self.runs), default=0)
        with stop_signals() as wish, Progress("training", left, "steps", self._runtime) as bar:
            while active := [run for run in self.runs if not run.done]:
                stop = self._step(active, lambda: wish.signal, bar)
                if stop and (unfinished := [run for run in active if not run.done]):
                    for run in unfinished:
                        run.save()
                        run.checkpoints.finish()
                    step = f"{unfinished[0].trainer.step:,}"
                    log.warning("asked to stop: checkpoint of step %s written; the same command continues", step)
                    raise SystemExit(128 + stop)
        if failed := [run for run in self.runs if run.failure]:
            raise NotFinite("; ".join(f"{run.config.out}: {run.failure}" for run in failed))

    def _step(self, active: Sequence[Run], signal: Callable[[], int], bar: Progress) -> int:
        """One step of the runs that are furthest behind; returns the signal that asks to stop."""
        step = min(run.trainer.step for run in active)
        stop, fvus, dead = 0, list[float](), 0.0
        for run in active:
            if run.trainer.step != step:
                continue
            try:
                result = run.step(stop or signal())
            except NotFinite as error:
                run.done, run.failure = True, str(error)
                log.warning("%s: ended: %s", run.config.out, error)
                continue
            stop = stop or result.stop_signal
            fvus.append(result.fvu)
            dead = max(dead, result.dead_fraction)
            if run.done:
                run.publish()
        shown = " to ".join(f"{fvu:.4f}" for fvu in dict.fromkeys((min(fvus), max(fvus)))) if fvus else ""
        bar.update(1, fvu=shown, dead=f"{dead:.1%}")
        return stop

    def _seek(self) -> None:
        """Each reader goes to the step of the run that is furthest behind; the others wait."""
        for run in sorted(self.runs, key=lambda run: run.trainer.step, reverse=True):
            if not run.done:
                run.trainer.rows.seek(run.trainer.step, run.trainer.position)


def _open_metrics(config: FitConfig, runtime: Runtime, step: int) -> Metrics | NoMetrics:
    if not runtime.is_main:
        return NoMetrics()
    files.make_folder(config.out)
    metrics = Metrics(config.out / "metrics.jsonl", step)
    if (mode := wanted(config.wandb)) != "off":
        metrics.copy_to(Wandb(config.out, mode, config_record(config), step))
    return metrics


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

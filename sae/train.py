"""Batches -> a trained SAE; or a corpus, through the model while it trains -> a trained SAE.

    python -m sae.train --batches batches/ --out run/ --n-latents 4096 --k 32
    torchrun --nproc_per_node=8 -m sae.train --batches batches/ --out run/ --n-latents 65536 --k 64

    torchrun --nproc_per_node=8 -m sae.train --batches batches/ --out run/ --n-latents 1048576 --k 32 --latent-parallel 8
    torchrun --nproc_per_node=8 -m sae.train --model M --corpus corpus/ --site layers.22.resid_post --out run/
    python -m sae.train --batches batches/ --out runs/ --runs grid.toml

With --model nothing but the SAE is written to the disk: docs/streaming.md. --runs trains several SAEs from one pass over the
rows, each in a folder of its own. Ranks share out the rows of every batch (data parallel), the latents (--latent-parallel), or
both. SIGTERM or Ctrl-C: one checkpoint of the current step, then exit; the same command continues from the newest complete
checkpoint, bit for bit.
`metrics.jsonl` holds, per line: `loss` = mean (z - z_hat)^2, `aux_loss` = mean (e - e_hat)^2 and `penalty`, both unweighted,
`fvu` = loss over the variance of z in all training rows, `l0`, `dead_fraction`, `lr`, `gradient_norm`, `since_fired_histogram`
and `density_histogram` (see Trainer.firing_histograms), `activations_per_s` of all ranks, `floor_share`, and `val_...`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from core.artifact import Artifact, Builder, open_artifact
from core.cli import machine, run_stage
from core.runtime import Runtime
from core.terminal import say
from sae.batches import Batches
from sae.fitting import FitConfig, Pass
from sae.model import load
from sae.rows import Shared, Source
from sae.streaming.flags import StreamFlags

if TYPE_CHECKING:
    from sae.plan import Amount, Plan


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FitConfig, StreamFlags):
    """Flags of the stage."""

    batches: Path | None = None
    """Folder written by sae.preprocess. Without it: --model and --corpus."""
    runs: Path | None = None
    """A TOML file with the flags in which several SAEs differ; --out holds a folder for each. See docs/streaming.md."""
    init_from: Path | None = None
    """Folder of an SAE (run/sae) whose weights to begin with."""
    plan: bool = machine(False)
    """Only say what the run would need: memory, disk, time."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        StreamFlags.__post_init__(self)
        if self.batches is None and not (self.model and self.corpus):
            raise ValueError("expected --batches, or --model and --corpus to train while the model runs; see --help")
        if self.batches is not None and (self.model or self.corpus or self.site):
            raise ValueError("--batches: its rows have a site already; give it, or --model, --corpus and --site, not both")


class Supply(Protocol):
    """Where the rows of all runs come from."""

    def settled(self, config: TrainConfig) -> TrainConfig:
        """The flags with what they leave open filled in. ValueError where there are too few rows for them."""

    def provenance(self, site: str) -> dict[str, Any]:
        """Of the rows at `site`."""

    @property
    def inputs(self) -> list[Artifact]: ...

    def amount(self, site: str) -> "Amount":
        """How many rows there are, for a plan."""

    def plan(self, runs: Sequence[TrainConfig], plan: "Plan") -> "Plan":
        """`plan` with what getting the rows needs besides."""

    def sources(self, runs: Sequence[TrainConfig], folder: Path) -> Mapping[str, Source]:
        """The rows of each site of `runs`; in `folder` lies what is kept of them."""


class FromBatches:
    """A folder of batches; its one site goes by the name "", which is what --site holds then."""

    def __init__(self, path: Path) -> None:
        self._batches = Batches(path)
        self.inputs = [self._batches.artifact]

    def settled(self, config: TrainConfig) -> TrainConfig:
        if (n_rows := len(self._batches.train)) < config.batch_size:
            raise ValueError(
                f"{config.batches}: holds {n_rows:,} training rows, fewer than one batch of --batch-size "
                f"{config.batch_size:,}; capture more text, or lower --batch-size"
            )
        return config

    def provenance(self, site: str) -> dict[str, Any]:
        return self._batches.provenance

    def sources(self, runs: Sequence[TrainConfig], folder: Path) -> Mapping[str, Source]:
        return {"": self._batches}

    def amount(self, site: str) -> "Amount":
        from sae.plan import Amount

        return Amount(self._batches.statistics.d_model, len(self._batches.train))

    def plan(self, runs: Sequence[TrainConfig], plan: "Plan") -> "Plan":
        return plan


def open_supply(config: TrainConfig, runtime: Runtime) -> Supply:
    """The rows that the flags ask for. What runs the model is loaded only where it is to run."""
    if config.batches:
        return FromBatches(config.batches)
    from sae.streaming.supply import FromModel

    return FromModel(config, runtime)


def run(config: TrainConfig, runtime: Runtime) -> None:
    """Train, or continue training, and write the run's folder, or one for each of --runs."""
    runs = [config]
    if config.runs:
        from sae.grid import read_runs  # for those who ask

        runs = read_runs(config, config.runs)
    supply = open_supply(config, runtime)
    runs = [supply.settled(one) for one in runs]
    if config.plan:
        from sae.plan import describe  # for those who ask

        text = describe(runs, supply, runtime)
        if runtime.is_main:
            say(text)
        return
    with Pass(runtime) as together:
        reserved = [(one, _reserve(one, supply, together)) for one in runs]
        missing = {one: builder for one, builder in reserved if builder}
        if missing:
            sources = supply.sources(list(missing), config.out)
            if len(missing) > 1:
                sources = {site: Shared(source) for site, source in sources.items()}
            for one, builder in missing.items():
                begin_with = load(one.init_from, dtype=getattr(torch, one.dtype)) if one.init_from else None
                together.add(one, sources[one.site], builder, begin_with)
            together.train()
    if config.runs and runtime.is_main:
        from sae.results import write_results

        say(write_results(config.out, runs))


def _reserve(config: TrainConfig, supply: Supply, together: Pass) -> Builder | None:
    inputs = list(supply.inputs)
    if config.init_from:
        inputs.append(open_artifact(config.init_from, "sae"))
    return together.reserve(config, supply.provenance(config.site), inputs)


if __name__ == "__main__":
    run_stage(TrainConfig, run, __doc__ or "")

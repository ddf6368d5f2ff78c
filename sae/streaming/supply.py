"""The rows that a model gives, site by site, for the runs of sae.train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch

from capture.chunks import ChunkCapture, CorpusChunks
from capture.store import open_corpus
from core.artifact import Artifact
from core.runtime import Comm, Runtime
from llama3 import load_model, load_tokenizer
from llama3.hub import model_name
from llama3.sites import check_sites, default_site
from sae.batches import Rows, Statistics
from sae.hyperparameters import Hyperparameters
from sae.plan import Amount, Plan
from sae.streaming.feeder import Feeder, Passes
from sae.streaming.flags import StreamFlags
from sae.streaming.needs import Needs, with_rows
from sae.streaming.order import ChunkOrder, Windows
from sae.streaming.reader import Storage, StreamReader
from sae.streaming.sample import SampleConfig, described, sample

ConfigT = TypeVar("ConfigT", bound=StreamFlags)


class FromModel:
    """A corpus and a model. The flags of `config` hold for all runs, but for --site."""

    def __init__(self, config: Any, runtime: Runtime) -> None:
        corpus, self._runtime, self._config = open_corpus(config.corpus), runtime, config
        tokenizer = load_tokenizer(config.model)
        model = load_model(config.model, runtime.device).eval()
        self._bos = tokenizer.bos_policy if config.bos == "auto" else config.bos
        self._model_name, self.n_layers = model_name(config.model), model.params.n_layers
        how = ChunkCapture(
            model=model,
            sites=[config.site or default_site(self.n_layers)],
            storage=config.storage,
            batch_tokens=config.batch_tokens,
            max_padding=config.max_padding,
            bos_id=tokenizer.bos_id if self._bos == "feed" else None,
            skip_nonfinite=config.nonfinite == "skip",
        )
        chunks = CorpusChunks(
            corpus=corpus,
            tokenizer=tokenizer,
            how=how,
            model_name=self._model_name,
            max_length=config.max_length,
            chunk_sentences=config.chunk_sentences,
        )
        chunks.check()
        self.inputs = [corpus.artifact]
        self.passes = Passes(
            chunks,
            ChunkOrder(len(chunks), config.rows_seed),
            config.validation_fraction,
            config.rows_seed,
            config.max_norm_ratio,
        )

    def settled(self, config: ConfigT) -> ConfigT:
        """The flags with what they leave open filled in. ValueError for an unknown site."""
        site = config.site or default_site(self.n_layers)
        check_sites(site, self.n_layers)
        return replace(config, site=site, bos=self._bos, model=self._model_name)

    def provenance(self, site: str) -> dict[str, Any]:
        """Of the rows at `site`."""
        return described(self.passes, site)

    def amount(self, site: str) -> Amount:
        """Rows of an epoch, from a sample of the sentences' lengths."""
        return Amount(self.passes.chunks.how.model.width(site), self._needs.rows)

    def plan(self, runs: Sequence[Any], plan: Plan) -> Plan:
        """With buffer and model, and beside it what batches on disk would take."""
        return with_rows(plan, self._config, runs, self._needs, self._runtime)

    @cached_property
    def _needs(self) -> Needs:
        return Needs(self.passes)

    def sources(self, runs: Sequence[Any], folder: Path) -> Mapping[str, "SiteSource"]:
        """The rows of each site of `runs`; their samples lie in `folder`/sample."""
        configs = {config.site: SampleConfig.of(config) for config in runs}
        most = self._config.buffer_rows
        samples, computed = sample(configs, self.passes, folder / "sample", self._runtime, most)
        feeder = Feeder(self.passes, self._runtime, configs, most)
        feeder.computed = computed
        return {
            site: SiteSource(self._config, artifact, described(self.passes, site), feeder) for site, artifact in samples.items()
        }


@dataclass(frozen=True)
class SiteSource:
    """The rows at one site."""

    flags: StreamFlags
    sample: Artifact
    provenance: dict[str, Any]
    feeder: Feeder

    @cached_property
    def statistics(self) -> Statistics:
        """Of the sample."""
        file = self.sample.file("statistics.safetensors")
        return Statistics(safetensors.torch.load_file(file))

    @cached_property
    def validation(self) -> Rows:
        """Of the held-out documents in the sample."""
        return Rows(self.sample, "validation")

    @property
    def rows_per_epoch(self) -> int:
        """Exact where the sample is the whole corpus, else as many as its sentences say."""
        return int(self.sample.manifest.counts["rows_per_epoch"])

    @property
    def trained_on(self) -> dict[str, Any]:
        """What an SAE's provenance says of these rows besides their own."""
        return {
            "sample_hash": self.sample.manifest.hash,
            "training_rows": self.rows_per_epoch,
        }

    def reader(self, config: Hyperparameters, data: Comm, device: torch.device) -> StreamReader:
        """The rows in the order of `config`, of which the ranks of `data` take a share each.

        ValueError where they do not fill a batch, or the buffer does not hold one.
        """
        all_steps = self.rows_per_epoch * config.epochs // config.batch_size
        if not all_steps:
            raise ValueError(
                f"the corpus gives about {self.rows_per_epoch:,} training rows, fewer than one batch of "
                f"--batch-size {config.batch_size:,}; give more text, or lower --batch-size"
            )
        n_steps = min(config.max_steps or all_steps, all_steps)
        windows = Windows.holding(self.flags.buffer_rows, config.batch_size, n_steps, config.rows_seed)
        storage = Storage(
            self.statistics.d_model,
            {"bf16": torch.bfloat16, "fp32": torch.float32}[self.flags.storage],
            device,
            self.flags.buffer_on == "host",
        )
        site = str(self.provenance["site"])
        reader = StreamReader(site, self.feeder, windows, data, storage)
        self.feeder.readers[site] = reader
        return reader

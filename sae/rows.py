"""Where the rows of training come from: batches on disk, or the model while it runs.

Shapes: n rows of this rank in a step, d width.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from core.runtime import Comm
from sae.batches import Rows, Statistics
from sae.hyperparameters import Hyperparameters


class Reader(Protocol):
    """The rows of a run, step by step."""

    @property
    def total_steps(self) -> int:
        """Steps of the run."""

    def rows_in(self, step: int) -> int:
        """How many rows all ranks together take in step `step` (from 0)."""

    def take(self, step: int) -> Tensor:
        """This rank's rows of `step` [n, d], on its device; n may be 0."""

    def position(self, step: int) -> dict[str, Tensor]:
        """What a checkpoint must hold to go on with `step`."""

    def seek(self, step: int, position: Mapping[str, Tensor]) -> None:
        """Go on with `step`; `position` comes from a checkpoint of that step."""


class Source(Protocol):
    """What is known of the rows before the first step, and what reads them."""

    @property
    def statistics(self) -> Statistics: ...

    @property
    def validation(self) -> Rows: ...

    @property
    def provenance(self) -> dict[str, Any]:
        """Of the rows."""

    @property
    def trained_on(self) -> dict[str, Any]:
        """What an SAE's provenance says of them besides."""

    def reader(self, config: Hyperparameters, data: Comm, device: torch.device) -> Reader:
        """The rows in the order of `config`, of which the ranks of `data` take a share each."""


class Shared:
    """A source whose rows several trainers learn from: each step is read once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.statistics, self.validation = source.statistics, source.validation
        self.provenance, self.trained_on = source.provenance, source.trained_on
        self._opened: SharedReader | None = None

    def reader(self, config: Hyperparameters, data: Comm, device: torch.device) -> "SharedReader":
        """The one reader of all; their flags must agree in what decides the rows."""
        if self._opened is None:
            self._opened = SharedReader(self._source.reader(config, data, device))
        return self._opened


class SharedReader:
    """A reader that keeps the rows of the last step that it was asked for."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self.total_steps = reader, reader.total_steps
        self._step, self._rows = -1, torch.empty(0)
        self.rows_in, self.position, self.seek = reader.rows_in, reader.position, reader.seek

    def take(self, step: int) -> Tensor:
        if step != self._step:
            self._rows = self._reader.take(step)
            self._step = step
        return self._rows

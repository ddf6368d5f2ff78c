"""Who takes part in benchmarks.bench_quality: ours, variants of ours that differ in one thing, and the peers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.sae_peers import DictionaryLearning, SAELens, Setup, Sparsify
from core.runtime import Runtime, Solo
from sae import architectures
from sae.batches import Batches
from sae.hyperparameters import Hyperparameters
from sae.trainer import Trainer

architectures.__path__.append(str(Path(__file__).parent / "architectures"))


class Contestant(Protocol):
    """What is trained and measured, on raw rows x [N, d]."""

    def step(self, x: Tensor) -> None:
        """One training step."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """`x_hat` [N, d]."""

    def latents(self, x: Tensor) -> Tensor:
        """Values of all latents, [N, n]."""


Maker = Callable[[Setup], Contestant]


class Ours:
    """sae.train: the trainer reads its own rows, which are those that the others are given."""

    def __init__(self, setup: Setup, batches: Batches, **flags: Any) -> None:
        common = {"n_latents": setup.n, "k": setup.k, "batch_size": setup.batch, "max_steps": setup.steps, "lr": setup.lr}
        self.trainer = Trainer(
            Hyperparameters(**common | flags), Runtime(0, 1, torch.device("cpu"), Solo()), batches, setup.seed
        )

    def step(self, x: Tensor) -> None:
        self.trainer.train_step()

    def _sae(self) -> Any:
        """With unit decoder rows, as it would be saved."""
        sae = self.trainer.sae
        if not sae.unit_decoder:
            sae = copy.deepcopy(sae)
            sae.fold_decoder_norms_()
        return sae

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        x_hat: Tensor = self._sae()(x)
        return x_hat

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        values, indices = self._sae().encode(x)
        return torch.zeros(len(x), self.trainer.config.n_latents).scatter_add_(1, indices, values)


class Peer:
    """A library of benchmarks.sae_peers on rows times `scale`, the normalisation that it is used to."""

    def __init__(self, library: Any, encode: Callable[[Any, Tensor], Tensor], scale: float) -> None:
        self.library, self.encode, self.scale = library, encode, scale

    def step(self, x: Tensor) -> None:
        self.library.step(x * self.scale)

    def reconstruct(self, x: Tensor) -> Tensor:
        x_hat: Tensor = self.library.reconstruct(x * self.scale) / self.scale
        return x_hat

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        return self.encode(self.library, x * self.scale)


def _sparsify_latents(library: Any, z: Tensor) -> Tensor:
    out = library.sae.encode(z)
    return torch.zeros(len(z), library.setup.n).scatter_(1, out.top_indices, out.top_acts.float())


PEERS: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor]]] = {
    "SAELens": (SAELens, lambda library, z: library.trainer.sae.encode(z)),
    "sparsify": (Sparsify, _sparsify_latents),
    "dictionary_learning": (DictionaryLearning, lambda library, z: library.trainer.ae.encode(z)),
}

VARIANTS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "ours": lambda setup: {},
    "ours, free decoder norms": lambda setup: {"architecture": "free_norms"},
    "ours, gradients clipped": lambda setup: {"clip_norm": 1 / setup.d},
    "ours, free norms and clipped": lambda setup: {"architecture": "free_norms", "clip_norm": 1 / setup.d},
    "ours, beta2 0.99": lambda setup: {"betas": (0.9, 0.99)},
}
"""Flags of `sae.train`. SAELens clips at 1 a loss that is summed over the d entries, where ours takes their mean."""


def tuned(batches: Batches) -> dict[str, Maker]:
    """From equal weights, with our Adam and schedule at the peak rate that `Setup` names."""
    scale = batches.statistics.scale("dataset")
    makers: dict[str, Maker] = {}
    for name, flags in VARIANTS.items():
        makers[name] = lambda setup, flags=flags: Ours(setup, batches, **flags(setup))
    for name, (make, encode) in PEERS.items():
        makers[name] = lambda setup, make=make, encode=encode: Peer(make(setup), encode, scale)
    return makers


def at_defaults(batches: Batches) -> dict[str, Maker]:
    """Everything the library's own, rate included, on rows as it expects them: sparsify and SAELens raw ones (their default is no
    normalisation), dictionary_learning ones of unit mean square norm (its normalize_activations).
    """
    square = batches.statistics.total_variance("none") + float(batches.statistics.centre("none").square().sum())
    scales = {"sparsify": 1.0, "SAELens": 1.0, "dictionary_learning": square**-0.5}
    return {
        f"{name}, its defaults": lambda setup, make=make, encode=encode, scale=scales[name]: Peer(
            make(setup, True), encode, scale
        )
        for name, (make, encode) in PEERS.items()
    }

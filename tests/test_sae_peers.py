"""The adapters of benchmarks/sae_peers.py: every library starts from our weights and takes our learning rate and Adam.

Ours runs everywhere; the others with `pytest -m peers`, where benchmarks/requirements.txt is installed.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.sae_peers import DictionaryLearning, Library, Ours, SAELens, Setup, Sparsify
from sae.batches import Batches
from sae.hyperparameters import Hyperparameters
from sae.trainer import Trainer
from tests.sae_folders import ALONE, make_batches, sparse_rows

SHAPE = {"d": 10, "n": 32, "k": 4, "batch": 60}


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    rows, _ = sparse_rows(750, 10, 30, active=3)
    return Batches(make_batches(tmp_path_factory.mktemp("rows"), rows + 0.5, batch_rows=32))


def trained(make: type[Library], setup: Setup, z: Tensor) -> Library:
    library = make(setup)  # type: ignore[call-arg]
    for rows in z.split(setup.batch):
        library.step(rows)
    return library


def test_ours_is_the_trainer(batches: Batches) -> None:
    """Start, schedule and step: the same weights as `sae.train` with its defaults, after the same rows."""
    trainer = Trainer(Hyperparameters(n_latents=32, k=4, batch_size=60, max_steps=5), ALONE, batches, seed=2)
    z = trainer.sae.normalise(batches.train.read(0, 300)).z
    for _ in range(5):
        trainer.train_step()
    library = trained(Ours, Setup(**SHAPE, steps=5, seed=2, centre=batches.statistics.centre("dataset")), z)
    assert isinstance(library, Ours)
    for name, wanted in trainer.sae.named_parameters():
        torch.testing.assert_close(library.sae.get_parameter(name), wanted, msg=name)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [Sparsify, SAELens, DictionaryLearning])
def test_a_peer_starts_where_ours_does(make: type[Library], batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step at a rate of zero leaves every library with the reconstructions of our first weights."""
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    z = batches.train.read(0, 60) * batches.statistics.scale("dataset")
    setup = Setup(**SHAPE, seed=2, centre=batches.statistics.centre("dataset"))
    with monkeypatch.context() as still:
        still.setattr(Setup, "lr_at", lambda self, step: 0.0)
        ours, theirs = trained(Ours, setup, z), trained(make, setup, z)
    torch.testing.assert_close(theirs.reconstruct(z), ours.reconstruct(z), rtol=1e-4, atol=1e-5)
    optimizer = theirs.optimizer if isinstance(theirs, Sparsify) else theirs.trainer.optimizer  # type: ignore[attr-defined]
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 6.25e-10)

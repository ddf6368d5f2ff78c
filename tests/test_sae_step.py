"""The hand-written training step and its fused update, against autograd in float64 and torch.optim.Adam."""

import copy

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sae.architectures import topk
from sae.gradients import RowGradients
from sae.loss import LossConfig, Losses
from sae.model import SAE, SAEConfig
from sae.update import update_

K_AUX = 4
NO_AUX = torch.empty(0, dtype=torch.long)


def make_sae(dtype: torch.dtype = torch.float64, n: int = 40, k: int = 5) -> SAE:
    """A small SAE with every parameter away from its initial value, and some latents that seldom pass the ReLU."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_model=12, n_latents=n, k=k, norm="none")).to(dtype)
    sae.initialise_("tied", generator)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_pre, sae.W_enc):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        sae.b_enc -= 1.6
    return sae


def rows(n: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_dead(n_dead: int, n: int = 40) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(2))[:n_dead].sort().values


def by_hand(sae: SAE, z: Tensor, dead: Tensor = NO_AUX) -> tuple[Losses, RowGradients]:
    """Of the mean loss."""
    return sae.row_gradients(z, LossConfig(sae.cfg.k, K_AUX, 1 / 32), 1 / z.numel(), dead, len(dead))


def by_autograd(sae: SAE, z: Tensor, dead: Tensor) -> Losses:
    """The same, with gradients in `.grad`."""
    part = sae.losses(z, LossConfig(sae.cfg.k, K_AUX, 1 / 32), dead, len(dead))
    (part.objective / z.numel()).backward()
    return part


@pytest.mark.parametrize("n_dead", [0, 1, 4, 17, 30])  # none, all of them chosen, by dense products, by sparse ones
def test_gradients_equal_autograd(n_dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 17 <= topk.DENSE_FACTOR * K_AUX < 30
    monkeypatch.setattr(topk, "CPU_ELEMENTS", 7 * 40)  # blocks of 7, 7 and 6 rows
    sae, z, dead = make_sae(), rows(20), some_dead(n_dead)
    (ours, gradients), theirs = by_hand(sae, z, dead), by_autograd(sae, z, dead)
    for name in ("objective", "main", "aux"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name).detach())
    assert ours.l0 == theirs.l0
    assert int(ours.l0) < 20 * 5  # the ReLU cut some of them off
    assert torch.equal(ours.fired, theirs.fired)
    enc, dec = gradients.rows(0, 40)
    found = {"W_enc": enc, "W_dec": dec, "b_enc": gradients.b_enc, "b_pre": gradients.b_pre}
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-11, atol=1e-13)
    for start, stop in ((0, 13), (13, 14), (14, 40)):
        for whole, part in zip((enc, dec), gradients.rows(start, stop), strict=True):
            torch.testing.assert_close(part, whole[start:stop], rtol=1e-12, atol=1e-14)


def test_gradients_tell_that_they_are_not_finite() -> None:
    sae, z = make_sae(), rows(20)
    part, gradients = by_hand(sae, z)
    assert bool(gradients.finite())
    with torch.no_grad():
        sae.W_dec[part.fired.argmax(), 3] = float("nan")
    assert not bool(by_hand(sae, z)[1].finite())


def adam(sae: SAE, decay: float) -> torch.optim.Adam:
    return torch.optim.Adam(
        sae.parameters(),
        lr=3e-3,
        betas=(0.85, 0.999),
        eps=6.25e-10,
        weight_decay=decay,
        decoupled_weight_decay=True,
        fused=True,
    )


def separate_update_(sae: SAE, optimizer: torch.optim.Adam, clip_norm: float, unit_decoder: bool) -> Tensor:
    """What `update_` does, one thing after another on gradients that are there; the norm before clipping []."""
    if unit_decoder:
        sae.remove_parallel_gradient_()
    norm = torch.nn.utils.get_total_norm([p.grad for p in sae.parameters() if p.grad is not None])
    if clip_norm:
        assert norm > clip_norm
        torch.nn.utils.clip_grad_norm_(sae.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if unit_decoder:
        sae.normalise_decoder_()
    return norm


def assert_same_state(ours: SAE, mine: torch.optim.Adam, theirs: SAE, twin: torch.optim.Adam) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(mine.state[a][moment], twin.state[b][moment], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("clip_norm", "decay", "unit_decoder"), [(0.0, 0.0, True), (1e-3, 0.01, True), (0.0, 0.0, False)])
def test_fused_update_equals_adam_in_separate_steps(
    clip_norm: float, decay: float, unit_decoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps, with AuxK in all but the first, in blocks of 7 latents."""
    monkeypatch.setattr("sae.update.CPU_ELEMENTS", 7 * 12)
    ours = make_sae()
    theirs = copy.deepcopy(ours)
    mine, twin = adam(ours, decay), adam(theirs, decay)
    for i in range(5):
        z, dead = rows(20, seed=i), some_dead(9) if i else NO_AUX
        norm = update_(ours, mine, by_hand(ours, z, dead)[1], clip_norm, unit_decoder)
        by_autograd(theirs, z, dead)
        torch.testing.assert_close(norm, separate_update_(theirs, twin, clip_norm, unit_decoder))
    assert_same_state(ours, mine, theirs, twin)
    twin.load_state_dict(mine.state_dict())  # the same form


@pytest.mark.parametrize("n_dead", [0, 6553])
def test_memory_beyond_weights_and_state(n_dead: int) -> None:
    """At the size of the benchmark on a CPU, with AuxK on two latents in five: at most three bf16 tensors of [batch, n]."""
    n, d, n_rows = 16_384, 512, 2048
    sae = SAE(SAEConfig(d_model=d, n_latents=n, k=32, norm="none"))
    optimizer, z = adam(sae, 0.0), torch.randn(n_rows, d, generator=torch.Generator().manual_seed(0))
    dead = torch.arange(0, n_dead * 2, 2)

    def run() -> None:
        part, gradients = sae.row_gradients(z, LossConfig(32, 256, 1 / 32), 1 / z.numel(), dead, n_dead)
        assert int(part.l0) > 0
        update_(sae, optimizer, gradients)

    run()  # Adam's moments are made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert n_rows * d * 4 < peak <= 3 * 2 * n_rows * n

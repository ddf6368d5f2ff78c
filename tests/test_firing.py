"""The flat top k against `SAE.encode`."""

import pytest
import torch

from interpretability.evidence.firing import Firing, firing
from sae.model import SAE, SAEConfig


def encoded(sae: SAE, x: torch.Tensor) -> set[tuple[int, int, float]]:
    values, indices = sae.encode(x)
    return {(row, int(i), float(v)) for row in range(len(x)) for v, i in zip(values[row], indices[row], strict=True) if v > 0}


def as_set(found: Firing) -> set[tuple[int, int, float]]:
    return set(zip(found.rows.tolist(), found.latents.tolist(), found.values.tolist(), strict=True))


def make_sae(n: int, k: int, bias: float = 0.0, architecture: str = "topk") -> SAE:
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=12, n_latents=n, k=k, architecture=architecture)).requires_grad_(False)
    sae.b_enc.fill_(bias)
    return sae


@pytest.mark.parametrize(("n", "k", "bias", "architecture"), [
    (512, 8, 0.0, "topk"),
    (512, 16, 0.0, "matryoshka"),
    (512, 1, 0.0, "topk"),
    (512, 8, -3.0, "topk"),  # fewer than k fire, on some rows none
    (512, 8, -99.0, "topk"),  # none at all
    (500, 8, 0.0, "topk"),  # no whole number of groups
    (64, 8, 0.0, "topk"),  # too few groups
    (512, 8, 1.0, "relu"),
])  # fmt: skip
def test_equal_to_encode(n: int, k: int, bias: float, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sae.model", "interpretability.evidence.firing"):
        monkeypatch.setattr(f"{module}.CPU_ELEMENTS", 70 * n)  # three blocks
    sae, x = make_sae(n, k, bias, architecture), torch.randn(200, 12)
    with torch.no_grad():
        found, expected = firing(sae, x), encoded(sae, x)
    assert as_set(found) == expected
    assert len(found.rows) == len(expected)
    assert torch.equal(found.rows, found.rows.sort().values)
    assert bool(expected) == (bias != -99.0)


def test_equal_values_are_chosen_as_encode_chooses() -> None:
    """Small integers, and latents that come twice: nearly every row has equals at its k-th place."""
    sae = make_sae(512, 8)
    sae.W_enc.copy_(torch.randint(-2, 3, (256, 12)).float().repeat(2, 1))
    x = torch.randint(-2, 3, (200, 12)).float()
    x[:50] = torch.randn(50, 12)
    with torch.no_grad():
        assert as_set(firing(sae, x)) == encoded(sae, x)
        assert as_set(firing(sae, torch.zeros(3, 12))) == set()


def test_no_rows() -> None:
    found = firing(make_sae(512, 8), torch.zeros(0, 12))
    assert [len(column) for column in found] == [0, 0, 0]
    assert found.latents.dtype == torch.int64


@pytest.mark.parametrize("threads", [2, 3, 300])
def test_threads_share_the_rows_and_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = make_sae(512, 8), torch.randn(200, 12)
    x[::7] = 0.0  # rows in which nothing but the bias fires
    monkeypatch.setattr("interpretability.evidence.firing.CPU_ELEMENTS", 70 * 512)  # three blocks
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    alone = firing(sae, x)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    together = firing(sae, x)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert len(alone.rows) > 1000

"""The product of the model and the SAE: its kernels agree, on both sides of the limits, and training never meets the one
without a gradient.
"""

import pytest
import torch

import core.product
from core.product import FEW_ROWS, LARGE_WEIGHT, Int8Weight, _rounded, int8_linear, linear


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of an AMD processor, wherever the tests run."""
    monkeypatch.setattr(core.product, "ONEDNN", torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("rows", [0, 1, 3, 700], ids=["none", "one row", "a few", "many"])
@pytest.mark.parametrize("shape", [(24, 40), (4200, 256)], ids=["small weight", "large weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_both_kernels_agree(rows: int, shape: tuple[int, int], dtype: torch.dtype, biased: bool) -> None:
    """Also of rows that do not lie one after the other. The large weight goes to oneDNN for a single row too."""
    assert (shape[0] * shape[1] >= LARGE_WEIGHT) == (shape[0] == 4200)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=generator), torch.randn(2, 2 * rows, shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator) if biased else None
    weight, x, bias = weight.to(dtype), x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.no_grad():
        for part in (x[:, :rows], x[:, ::2]):
            expected = part @ weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(
                linear(part, weight, bias), expected, rtol=0, atol=2e-4 if dtype != torch.bfloat16 else 1
            )


def test_products_keep_their_gradients() -> None:
    weight = torch.randn(600, 256, requires_grad=True)
    linear(torch.ones(700, 256), weight).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((600, 256), 700.0))


def test_many_rows_come_in_few_sizes() -> None:
    """A kernel is compiled and kept for each, so batches of any size must not have one of their own; few rows keep theirs."""
    sizes = [_rounded(n) for n in range(1, 8193)]
    assert sizes[: FEW_ROWS - 1] == list(range(1, FEW_ROWS))
    assert len(set(sizes[FEW_ROWS - 1 :])) < 60
    assert all(n <= rows <= 1.125 * n for n, rows in enumerate(sizes, 1))


@pytest.mark.parametrize("shape", [(65,), (3, 47), (700,), (0,), (64,)])
def test_rounding_the_rows_leaves_the_product(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(*shape, 256), torch.randn(704, 256), torch.randn(704)
    with torch.no_grad():
        found = linear(x, weight, bias)
    assert found.shape == (*shape, 704)
    assert found.is_contiguous()
    torch.testing.assert_close(found, x @ weight.T + bias, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_8_bit_products_are_within_the_rounding_of_both_factors(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(96, 64, generator=generator), torch.randn(1, rows, 64, generator=generator)
    weight[3] = 0
    weight[4] *= 1e-39  # a scale that many processors would take for 0
    small = Int8Weight.of(weight)
    by_hand = x.double() @ (small.integers.double() * small.scales.double()[:, None]).T
    product = int8_linear(x, small)
    assert product.dtype == torch.float32
    bound = 2**-8 * (x.abs() @ (small.integers.abs().float() * small.scales[:, None]).T) + 1e-30
    assert ((product - by_hand).abs() <= bound).all()
    exact = x @ weight.T
    assert float((product - exact).norm() / exact.norm()) < 0.02

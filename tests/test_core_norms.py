"""Norms of rows at both ends of float32."""

import pytest
import torch

from core.norms import CPU_ROWS, row_norms, unit_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2 * CPU_ROWS + 3, 4), (2, 5, 3)])
def test_norms_are_those_of_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    norms = row_norms(x)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, x.double().square().sum(-1).sqrt())


def test_a_norm_is_finite_exactly_where_the_row_is() -> None:
    x = torch.tensor([[3.4e38, 3.4e38], [1e-40, 0.0], [float("inf"), 0.0], [0.0, float("nan")], [float("inf"), float("nan")]])
    norms = row_norms(x)
    assert norms.isfinite().tolist() == [True, True, False, False, False]
    torch.testing.assert_close(norms[:2], torch.tensor([3.4e38 * 2**0.5, 1e-40], dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e19, 1e37])
def test_rows_of_any_size_become_unit_rows(size: float) -> None:
    rows = torch.randn(CPU_ROWS + 5, 4, generator=torch.Generator().manual_seed(0))
    rows[7] = 0
    unit = unit_rows(rows * size)
    wanted = torch.ones(len(rows))
    wanted[7] = 0
    torch.testing.assert_close(torch.linalg.vector_norm(unit, dim=1), wanted)
    torch.testing.assert_close(unit, unit_rows(rows))

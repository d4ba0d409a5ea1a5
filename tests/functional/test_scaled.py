"""A matrix that is not multiplied out is the one that is: against loops, dense matrices in float64, and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptql.functional.scaled import Scaled

Steps = list[tuple[str, Tensor]]
ROWS, COLUMNS = 5, 7
HAS = ["", "rows", "columns", "rows and columns"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def factor(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """0.5 to 2, of both signs."""
    signs = torch.where(torch.rand(size) < 0.3, -1.0, 1.0)
    return ((0.5 + 1.5 * torch.rand(size)) * signs).to(dtype).requires_grad_()


def matrix(has: str, dtype: torch.dtype = torch.float64) -> Scaled:
    base = torch.randn(ROWS, COLUMNS, dtype=torch.float64).to(dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    rows = factor(ROWS, kind) if "rows" in has else None
    return Scaled(base, rows, factor(COLUMNS, kind) if "columns" in has else None)


def by_loops(scaled: Scaled) -> list[list[float]]:
    rows = [1.0] * ROWS if scaled.rows is None else scaled.rows.tolist()
    columns = [1.0] * COLUMNS if scaled.columns is None else scaled.columns.tolist()
    return [[scaled.base[i, j].item() * rows[i] * columns[j] for j in range(COLUMNS)] for i in range(ROWS)]


CHAINS: dict[str, Callable[[], Steps]] = {
    "rows": lambda: [("rows", factor(ROWS))],
    "columns": lambda: [("columns", factor(COLUMNS))],
    "rows, columns": lambda: [("rows", factor(ROWS)), ("columns", factor(COLUMNS))],
    "columns, rows": lambda: [("columns", factor(COLUMNS)), ("rows", factor(ROWS))],
    "each twice": lambda: [(kind, factor(ROWS if kind == "rows" else COLUMNS)) for kind in ("rows", "columns") * 2],
}


def chained(scaled: Scaled, steps: Steps) -> Scaled:
    for kind, by in steps:
        scaled = scaled.divide_rows(by) if kind == "rows" else scaled.scale_columns(by)
    return scaled


def dense_chain(dense: Tensor, steps: Steps) -> Tensor:
    for kind, by in steps:
        dense = dense / by[:, None] if kind == "rows" else dense * by
    return dense


def same_gradients(ours: Tensor, dense: Tensor, of: list[Tensor]) -> None:
    weights = torch.randn_like(dense)
    mine = torch.autograd.grad((ours * weights).sum(), of, retain_graph=True)
    theirs = torch.autograd.grad((dense * weights).sum(), of, retain_graph=True)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("has", HAS)
def test_the_matrix_multiplied_out_by_loops(has: str) -> None:
    scaled = matrix(has)
    dense = scaled.dense()
    assert dense.dtype == torch.float64
    assert dense.shape == scaled.shape == (ROWS, COLUMNS)
    torch.testing.assert_close(dense, torch.tensor(by_loops(scaled), dtype=torch.float64), rtol=1e-12, atol=0.0)
    assert scaled.is_learned == bool(has)


@pytest.mark.parametrize("has", HAS)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_of_factors_is_that_of_the_dense_matrix(chain: str, has: str) -> None:
    start, steps = matrix(has), CHAINS[chain]()
    ours, dense = chained(start, steps), dense_chain(start.dense(), steps)
    torch.testing.assert_close(ours.dense(), dense, rtol=1e-12, atol=0.0)
    factors = [f for f in (start.rows, start.columns) if f is not None] + [by for _, by in steps]
    same_gradients(ours.dense(), dense, factors)
    assert ours.base is start.base  # nobody has multiplied it out


@pytest.mark.parametrize("has", HAS)
@pytest.mark.parametrize("chain", CHAINS)
def test_the_product_with_a_vector_is_that_of_the_dense_matrix(chain: str, has: str) -> None:
    start, steps, vector = matrix(has), CHAINS[chain](), torch.randn(COLUMNS, dtype=torch.float64).requires_grad_()
    ours, dense = chained(start, steps).times(vector), dense_chain(start.dense(), steps) @ vector
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
    factors = [f for f in (start.rows, start.columns) if f is not None] + [by for _, by in steps]
    same_gradients(ours, dense, [vector, *factors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_as_it_is_stored_is_computed_with_in_float32(dtype: torch.dtype) -> None:
    scaled, vector = matrix("rows and columns", dtype), torch.randn(COLUMNS)
    assert scaled.base.dtype == dtype
    dense, product = scaled.dense(), scaled.times(vector)
    assert dense.dtype == product.dtype == torch.float32
    expected = torch.tensor(by_loops(scaled), dtype=torch.float64)
    torch.testing.assert_close(dense.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(product.double(), expected @ vector.double(), rtol=1e-5, atol=1e-5)


def test_changes_make_new_ones_and_leave_the_old_alone() -> None:
    scaled = matrix("rows and columns")
    before = scaled.dense()
    scaled.divide_rows(factor(ROWS))
    scaled.scale_columns(factor(COLUMNS))
    assert torch.equal(scaled.dense(), before)


def test_frozen_factors_are_not_learned() -> None:
    scaled = matrix("")
    assert not scaled.divide_rows(torch.full((ROWS,), 2.0)).is_learned
    assert scaled.divide_rows(torch.full((ROWS,), 2.0)).scale_columns(factor(COLUMNS, torch.float32)).is_learned

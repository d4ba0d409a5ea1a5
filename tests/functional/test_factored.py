"""Factors of low rank against loops in float64."""

from __future__ import annotations

import pytest
import torch

from ptql.functional.factored import factor, factored, ones_of_rank

RANKS = [1, 2, 4, 64]


@pytest.mark.parametrize("rank", RANKS)
def test_the_product_is_one_at_first_and_no_component_is_like_another(rank: int) -> None:
    left, right = ones_of_rank(7, 5, rank)
    assert (left.shape, right.shape) == ((7, rank), (rank, 5))
    assert torch.equal(factor(left, right), torch.ones(7, 5))
    assert left.any(0).all()  # the way to every row of `right`
    assert left.T.unique(dim=0).shape[0] == rank
    assert not right[1:].any()


def test_the_start_leaves_the_runs_random_numbers_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ones_of_rank(7, 5, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, ones_of_rank(7, 5, 3)))


@pytest.mark.parametrize("rank", RANKS[:3])
def test_values_and_gradients_against_float64(rank: int) -> None:
    torch.manual_seed(rank)
    leaves = [t.requires_grad_() for t in (torch.randn(6, 9), torch.randn(6, rank), torch.randn(rank, 9))]
    grad = torch.randn(6, 9)
    made = factored(*leaves)
    w, left, right = wide = [t.detach().double().requires_grad_() for t in leaves]
    rows = [[w[i, j] * sum(left[i, k] * right[k, j] for k in range(rank)) for j in range(9)] for i in range(6)]
    slow = torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(made.double(), slow, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(made, leaves, grad)
    expected = torch.autograd.grad(slow, wide, grad.double())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_gradients_that_nobody_wants_are_left_out() -> None:
    w, (left, right) = torch.randn(6, 9), ones_of_rank(6, 9, 2)
    factored(w, left, right.requires_grad_()).sum().backward()
    torch.testing.assert_close(right.grad, left.T @ w)
    assert not factored(w, left, right.detach()).requires_grad


def test_autocast_does_not_make_it_coarser() -> None:
    left, right = torch.full((2, 2), 1.001), torch.full((2, 3), 1.001)
    with torch.autocast("cpu", torch.bfloat16):
        made = factor(left, right)
    assert torch.equal(made, torch.full((2, 3), 1.001) * 1.001 * 2)

"""Scales of clusters against loops over weights and plain autograd in float64, and against groups of one size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.functional import affine, cluster_scales

CLUSTER = torch.tensor([2, 0, 2, 2, 4, 0, 2, 5, 2, 2, 4, 2, 2])  # of 13 columns; 1 and 3 have none, 5 has one
CLUSTERS = 6
GRIDS = [(2, False), (3, True), (4, False), (4, True), (5, True), (16, False), (16, True), (256, False)]


def some_weights() -> Tensor:
    torch.manual_seed(0)
    w = torch.randn(5, 13, dtype=torch.float64)
    w[0] = w[0].abs() + 0.1  # a row of one sign
    w[1] = -w[0]
    w[2] = 0
    return w


def some_logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, CLUSTERS, dtype=torch.float64), torch.randn(5, CLUSTERS, dtype=torch.float64)


# The references


def members(c: int) -> list[int]:
    return [j for j in range(13) if CLUSTER[j] == c]


def loop_ends(w: Tensor, i: int, c: int, shares: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    values = [w[i, j].item() for j in members(c)]
    return min([*values, 0.0]) * shares[0], max([*values, 0.0]) * shares[1]


def loop_grid(low: float, high: float, levels: int, symmetric: bool) -> tuple[float, int]:
    if symmetric:
        scale = max(-low, high) / ((levels - 1) // 2)
        return min(max(scale, affine.SMALLEST_SCALE), affine.LARGEST_SCALE), levels // 2
    scale = min(max((high - low) / (levels - 1), affine.SMALLEST_SCALE), affine.LARGEST_SCALE)
    return scale, min(max(round(-low / scale), 0), levels - 1)


def by_autograd(w: Tensor, lower: Tensor, upper: Tensor, levels: int, symmetric: bool) -> Tensor:
    """Cluster by cluster, rounding straight through; the zero point has no gradient."""
    parts = torch.zeros_like(w)
    for c in range(CLUSTERS):
        if not (columns := members(c)):
            continue
        own = w[:, columns]
        low = own.min(1, keepdim=True).values.clamp(max=0) * lower[:, c : c + 1].sigmoid()
        high = own.max(1, keepdim=True).values.clamp(min=0) * upper[:, c : c + 1].sigmoid()
        top = levels - 1
        if symmetric:
            scale = (torch.maximum(-low, high) / ((levels - 1) // 2)).clamp(affine.SMALLEST_SCALE)
            zero = torch.full_like(scale, levels // 2)
        else:
            scale = ((high - low) / top).clamp(affine.SMALLEST_SCALE)
            zero = (-low / scale).detach().round().clamp(0, top)
        ratio = own / scale
        code = (ratio + (ratio.round() - ratio).detach() + zero).clamp(0, top)
        parts = parts.index_copy(1, torch.tensor(columns), (code - zero) * scale)
    return parts


# Ranges


def test_ends_hold_zero_and_those_of_no_column_are_zero() -> None:
    w, (lower, upper) = some_weights(), some_logits()
    whole = cluster_scales.weight_range(w, CLUSTER, CLUSTERS)
    clipped = cluster_scales.weight_range(w, CLUSTER, CLUSTERS, lower, upper)
    for i in range(5):
        for c in range(CLUSTERS):
            assert (whole[0][i, c, 0].item(), whole[1][i, c, 0].item()) == loop_ends(w, i, c)
            shares = lower[i, c].sigmoid().item(), upper[i, c].sigmoid().item()
            expected = loop_ends(w, i, c, shares)
            assert clipped[0][i, c, 0].item() == pytest.approx(expected[0], abs=1e-15)
            assert clipped[1][i, c, 0].item() == pytest.approx(expected[1], abs=1e-15)
    assert not whole[0][:, [1, 3]].any()
    assert not whole[1][:, [1, 3]].any()


def test_columns_that_reach_an_end_share_its_gradient() -> None:
    w = torch.tensor([[3.0, 1.0, 3.0, -2.0]], requires_grad=True)
    low, high = cluster_scales.weight_range(w, torch.zeros(4, dtype=torch.long), 1)
    (8 * high + low).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [[4.0, 0.0, 4.0, 1.0]]


def test_sums_of_clusters() -> None:
    w = some_weights()
    found = cluster_scales.cluster_sums(w, CLUSTER, CLUSTERS)
    for i in range(5):
        for c in range(CLUSTERS):
            assert found[i, c].item() == pytest.approx(sum(w[i, j].item() for j in members(c)), abs=1e-12)


# Rounding


@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_values_and_gradients_are_those_of_each_cluster_by_itself(levels: int, symmetric: bool) -> None:
    w, (lower, upper) = some_weights(), some_logits()
    w[2] = torch.randn(13, dtype=torch.float64)  # no equals, which would share a gradient
    leaves = [leaf.requires_grad_() for leaf in (w, lower, upper)]
    ends = cluster_scales.weight_range(w, CLUSTER, CLUSTERS, lower, upper)
    grid = affine.scale_and_zero(*ends, levels, symmetric)
    found = cluster_scales.fake_quantize(w, *grid, CLUSTER, levels)
    expected = by_autograd(w, lower, upper, levels, symmetric)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(w.shape, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((made * weight).sum(), leaves) for made in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert not mine[1][:, [1, 3]].any()


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_codes_are_made_for_the_scales_that_are_stored(levels: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    w = some_weights()
    ends = cluster_scales.weight_range(w, CLUSTER, CLUSTERS)
    codes, scale, zero = cluster_scales.encode(w, *ends, levels, CLUSTER, symmetric, scale_dtype)
    decoded = cluster_scales.dequantize(codes, scale, zero, levels, CLUSTER)
    assert (scale.dtype, decoded.dtype, tuple(scale.shape)) == (torch.float16, torch.float32, (5, CLUSTERS))
    assert (zero is None) == symmetric
    for i in range(5):
        for j in range(13):
            c = int(CLUSTER[j])
            low, high = loop_ends(w, i, c)
            exact, middle = loop_grid(low, high, levels, symmetric)
            step = torch.tensor(exact).to(scale_dtype).half().item()
            assert scale[i, c].item() == step
            if zero is not None:
                middle = min(max(round(-low / step), 0), levels - 1)
                assert zero[i, c].item() == middle
            code = min(max(round(w[i, j].item() / step) + middle, 0), levels - 1)
            assert codes[i, j].item() == code
            assert decoded[i, j].item() == (code - middle) * step


@pytest.mark.parametrize("symmetric", [False, True])
def test_neighbours_in_equal_numbers_are_groups(symmetric: bool) -> None:
    torch.manual_seed(2)
    w, cluster = torch.randn(4, 24, requires_grad=True), torch.arange(24) // 8
    lower, upper = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    mine = cluster_scales.weight_range(w, cluster, 3, lower, upper)
    groups = affine.grouped(w, 8)
    theirs = affine.weight_range(groups, lower, upper)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    grid = affine.scale_and_zero(*theirs, 8, symmetric)
    found = cluster_scales.fake_quantize(w, *affine.scale_and_zero(*mine, 8, symmetric), cluster, 8)
    expected = affine.ungrouped(affine.fake_quantize(groups, *grid, 8), 24)
    assert torch.equal(found, expected)
    weight = torch.randn(4, 24)
    grads = [torch.autograd.grad((made * weight).sum(), (w, lower, upper)) for made in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        stored = cluster_scales.encode(w, *mine, 8, cluster, symmetric)
        plain = affine.encode(w, *theirs, 8, 8, symmetric)
    assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(stored, plain, strict=True))
    assert torch.equal(cluster_scales.dequantize(*stored, 8, cluster), affine.dequantize(*plain, 8, 8))

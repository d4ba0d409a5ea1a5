"""Static grids against loops over numbers; their edges; gradients; the original's grid in its own words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.functional.static import (
    FARTHEST_ZERO,
    SHARES,
    cluster_ranges,
    fake_quantize_channels,
    range_errors,
    round_probabilities,
    running_mean,
    static_grid,
)

LABELS = torch.tensor([[0, 2, 1, 1, 0, 2], [0, 0, 0, 1, 1, 1]])  # the second row has two clusters of three


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def half(value: float) -> float:
    return torch.tensor(value).half().double().item()


def slow_grid(low: float, high: float, bits: int, faithful: bool) -> tuple[float, int]:
    """Scale and zero point of one range."""
    if not faithful:
        scale = half(min(max((high - low) / (2**bits - 1), 1e-6), 1e4))
        return scale, round(-low / scale)
    # signed codes, as the original has them, -2^(bits - 1) .. 2^(bits - 1) - 1
    scale = half(min(max((high - low) * 2**-bits, 1e-4), 1e4))
    return scale, round(min(max(-0.5 * (high + low) / scale, -1e4), 1e4)) + 2 ** (bits - 1)


def slow_round(x: float, scale: float, zero: int, bits: int) -> float:
    return (min(max(round(x / scale) + zero, 0), 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_and_rounding_against_loops(bits: int, faithful: bool) -> None:
    low, high = some(2, 3).neg().abs() + 1, some(2, 3, seed=1).abs() + 1.5
    scale, zero = static_grid(low, high, bits, faithful)
    x = some(5, 3, seed=2) * 2
    rounded = fake_quantize_channels(x, scale[:1].expand(5, -1)[:1], zero[:1], bits)
    for row in range(2):
        for k in range(3):
            expected = slow_grid(low[row, k].item(), high[row, k].item(), bits, faithful)
            assert (scale[row, k].item(), zero[row, k].item()) == expected
    for token in range(5):
        for k in range(3):
            expected = slow_round(x[token, k].item(), scale[0, k].item(), int(zero[0, k]), bits)
            assert rounded[token, k].item() == pytest.approx(expected)


def test_ours_keeps_both_ends_and_the_originals_loses_the_largest() -> None:
    low, high = torch.tensor([-1.0]), torch.tensor([2.0])
    ends = torch.tensor([[-1.0], [2.0]])
    ours = fake_quantize_channels(ends, *(part[None] for part in static_grid(low, high, 4)), 4)
    torch.testing.assert_close(ours, ends, atol=2e-3, rtol=0)
    scale, zero = static_grid(low, high, 4, faithful=True)
    theirs = fake_quantize_channels(ends, scale[None], zero[None], 4)
    assert scale / 2 < 2 - theirs[1] < scale  # clamped, though it was seen


@pytest.mark.parametrize(("low", "high"), [(1000.0, 1000.25), (-1001.0, -1000.9), (5e4, 5e4), (0.0, 0.0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ranges_far_from_zero_and_of_one_value(low: float, high: float, bits: int) -> None:
    """A cluster may hold one massive channel that hardly changes."""
    scale, zero = static_grid(torch.tensor([low]), torch.tensor([high]), bits)
    assert zero.abs() <= FARTHEST_ZERO * 1.01
    ends = torch.tensor([[low], [high]])
    rounded = fake_quantize_channels(ends, scale[None], zero[None], bits)
    assert (rounded - ends).abs().max() <= scale / 2 + 1e-3 * (high - low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept_and_clamped_values_have_no_gradient(dtype: torch.dtype) -> None:
    x = torch.tensor([[-5.0, 0.3, 5.0]], dtype=dtype, requires_grad=True)
    scale, zero = torch.full((1, 3), 0.25), torch.full((1, 3), 8.0)
    rounded = fake_quantize_channels(x, scale, zero, 4)
    assert rounded.dtype == dtype
    assert rounded.tolist() == [[-2.0, 0.25, 1.75]]
    (3 * rounded).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 3.0, 0.0]]


@pytest.mark.parametrize("bits", [4, 8])
def test_probabilities_against_loops(bits: int) -> None:
    shares = some(3, 7).softmax(-1).requires_grad_()
    rounded = round_probabilities(shares, bits)
    for row in range(3):
        for key in range(7):
            expected = round(shares[row, key].item() * (2**bits - 1)) / (2**bits - 1)
            assert rounded[row, key].item() == pytest.approx(expected, abs=1e-6)
    rounded.sum().backward()
    assert shares.grad is not None
    assert torch.equal(shares.grad, torch.ones_like(shares))


def test_ranges_of_clusters_against_loops() -> None:
    one, other = some(4, 2, 6), some(4, 2, 6, seed=1)
    low, high = cluster_ranges(torch.minimum(one, other), torch.maximum(one, other), LABELS, 3)
    for sample in range(4):
        for row in range(2):
            for k in range(3):
                members = [c for c in range(6) if LABELS[row, c] == k]
                values = [x[sample, row, c].item() for c in members for x in (one, other)] or [0.0]
                assert low[sample, row, k].item() == min(values)
                assert high[sample, row, k].item() == max(values)


def test_running_mean_against_its_rule() -> None:
    values = some(5, 1, 1)
    expected = values[0].item()
    for value in values[1:]:
        expected = 0.99 * expected + 0.01 * value.item()
    assert running_mean(values).item() == pytest.approx(expected)
    assert torch.equal(running_mean(values[:1]), values[0])


@pytest.mark.parametrize("faithful", [False, True])
def test_errors_of_shrunken_ranges_against_loops(faithful: bool) -> None:
    x, shares = some(3, 4, 2, 6), (1.0, 0.7, 0.4)
    lowest, highest = x.flatten(0, 1).aminmax(dim=0)
    low, high = (part[0] for part in cluster_ranges(lowest[None], highest[None], LABELS, 3))
    found = range_errors(x, low, high, LABELS, 3, faithful, shares)
    for index, share in enumerate(shares):
        for row in range(2):
            for k in range(3):
                scale, zero = slow_grid(low[row, k].item() * share, high[row, k].item() * share, 3, faithful)
                values = x[..., row, :].flatten(0, 1)[:, LABELS[row] == k].flatten().tolist()
                expected = sum((slow_round(v, scale, zero, 3) - v) ** 2 for v in values)
                assert found[index, row, k].item() == pytest.approx(expected)


def test_what_is_tried_begins_with_the_whole_range() -> None:
    assert SHARES[0] == 1
    assert SHARES[-1] == pytest.approx(0.4)
    assert list(SHARES) == sorted(SHARES, reverse=True)

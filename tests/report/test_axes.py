from __future__ import annotations

import math

import pytest

from ptql.report.axes import channel_ticks, index_ticks, linear_axis, log_axis

RANGES = [(1e-12, 1e6), (0.001, 0.3), (0.05, 0.7), (1.0, 1.3), (3.0, 3.0), (1e-300, 1e300), (2e5, 3e5)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_log_axes_hold_their_values_and_have_some_ticks(low, high):
    axis = log_axis([high, low, 0.0, math.nan, math.inf, -1.0])
    assert axis.log
    assert 0 <= axis.at(low) <= axis.at(high) <= 1
    assert 2 <= len(axis.ticks) <= 8
    values = [value for value, _ in axis.ticks]
    assert values == sorted(values)
    assert all(axis.low <= value <= axis.high for value in values)
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)


def test_equal_factors_are_equally_far_apart():
    axis = log_axis([0.01, 1.0, 100.0])
    assert axis.at(1.0) - axis.at(0.01) == pytest.approx(axis.at(100.0) - axis.at(1.0))
    assert [label for _, label in axis.ticks] == ["0.01", "0.1", "1", "10", "100"]


@pytest.mark.parametrize("values", [[], [math.nan], [0.0, 0.0], [-3.0, -1.0], [5.0, math.inf]])
def test_linear_axes_hold_zero_and_never_fail(values):
    axis = log_axis(values) if not any(v > 0 for v in values) else linear_axis(values)
    assert not axis.log
    assert axis.low <= 0 <= axis.high
    assert axis.low < axis.high
    assert len(axis.ticks) >= 2


def test_what_lies_beyond_is_at_the_end():
    axis = linear_axis([10.0])
    assert (axis.at(-1.0), axis.at(1e9)) == (0.0, 1.0)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 30, 32, 80, 126, 1000])
def test_few_indices_get_a_label(count):
    ticks = index_ticks(count)
    assert ticks[0] == 0
    assert ticks[-1] < count
    assert min(count, 3) <= len(ticks) <= 10


@pytest.mark.parametrize("count", [1, 64, 576, 11008])
def test_channels_get_round_numbers(count):
    ticks = channel_ticks(count)
    assert ticks[0] == 0
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 6

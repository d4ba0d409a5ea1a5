from __future__ import annotations

import math

import pytest
import torch

from ptql.report.ranges import largest_of_bins, log_limits, not_finite, outlier_ratio


def test_the_ratio_is_largest_over_median_of_channels_that_are_used():
    assert outlier_ratio(torch.tensor([1.0, 2.0, 100.0])) == pytest.approx(50)
    assert outlier_ratio(torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 100.0, math.inf, math.nan])) == pytest.approx(50)
    assert math.isnan(outlier_ratio(torch.zeros(4)))
    assert math.isnan(outlier_ratio(torch.empty(0)))


@pytest.mark.parametrize(("channels", "most"), [(1, 10), (10, 10), (11, 10), (8192, 180)])
def test_bins_keep_every_outlier(channels, most):
    peaks = torch.rand(channels)
    peaks[channels // 2] = 50.0
    bins = largest_of_bins(peaks, most)
    assert len(bins) <= most
    assert max(bins) == 50.0
    size = math.ceil(channels / most)
    assert bins == [max(peaks[i : i + size].tolist()) for i in range(0, channels, size)]


def test_limits_leave_out_dead_channels():
    assert log_limits([0.0, 1e-30, 2.0], [math.inf]) == [pytest.approx(2e-4), 2.0]
    assert log_limits([], [0.0]) == []


def test_channels_that_are_not_finite_are_counted():
    assert not_finite(torch.tensor([1.0, math.inf, math.nan])) == 2

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ptql.callbacks.range_figure import AFTER, BEFORE, HEIGHT, TITLE, WIDTH, range_figure

from tests.callbacks.runs import record


def like(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Where the picture has a colour, nearly."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(pixels.astype(int) - wanted) < 24).all(-1)


def test_every_input_has_a_panel_with_both_profiles():
    made = range_figure(record(2).ranges, "Block 2")
    assert made.shape == (TITLE + 2 * HEIGHT, 2 * WIDTH, 3)
    assert made.dtype == np.uint8
    for row in range(2):
        for column in range(2):
            panel = made[TITLE + row * HEIGHT : TITLE + (row + 1) * HEIGHT, column * WIDTH : (column + 1) * WIDTH]
            assert like(panel, AFTER).sum() > 300
            if (row, column) != (1, 1):  # the last one is not smoothed: one profile hides the other
                assert like(panel, BEFORE).sum() > 100


def test_an_outlier_stands_out():
    flat, peak = torch.ones(100), torch.ones(100)
    peak[50] = 1000.0
    made = like(range_figure({"before.a": flat, "after.a": peak}, "Block 0"), AFTER)[TITLE:, :WIDTH]
    heights = [int(np.flatnonzero(made[56:, x])[0]) if made[56:, x].any() else HEIGHT for x in range(70, 490)]
    top = int(np.argmin(heights)) + 70
    assert abs(top - (58 + (520 - 58 - 18) * 0.505)) < 4
    assert min(heights) < 40
    assert sorted(heights)[20] > 120


@pytest.mark.parametrize(
    "ranges",
    [
        {"before.a": torch.zeros(4)},
        {"after.a": torch.tensor([math.nan, math.inf, 1.0])},
        {"before.a": torch.ones(1), "after.a": torch.full((1,), 1e30)},
    ],
)
def test_odd_values_are_drawn_somehow(ranges):
    assert range_figure(ranges, "Block 0").shape == (TITLE + HEIGHT, 2 * WIDTH, 3)

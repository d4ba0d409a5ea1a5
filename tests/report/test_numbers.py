from __future__ import annotations

import math

import pytest

from ptql.report.numbers import duration, figure, gibibytes, megabytes, plural, power_of_ten, ranges_of, real


@pytest.mark.parametrize("value", [None, True, "three", [], {}, 10**400])
def test_what_is_no_number_is_nan(value):
    assert math.isnan(real(value))


def test_strings_of_json_are_numbers():
    assert real("inf") == math.inf
    assert math.isnan(real("nan"))
    assert real(3) == 3.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (21.6349, "21.63"),
        (0.0123456, "0.01235"),
        (12345.6, "12,346"),
        (5.1e6, "5.100e6"),
        (1.726e-5, "1.726e-5"),
        (-0.5, "-0.5000"),
        (math.nan, "nan"),
        ("inf", "inf"),
        (None, "nan"),
    ],
)
def test_figures_have_four_digits(value, text):
    assert figure(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.94, "4.9 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (7805, "2 h 10 min"),
        (90000, "1 d 1 h"),
        (86400 + 59, "1 d"),
        (math.nan, "?"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_sizes():
    assert megabytes(167_400_000) == "167 MB"
    assert megabytes(7_300_000_000) == "7.30 GB"
    assert megabytes(12) == "12 bytes"
    assert megabytes(math.nan) == "?"
    assert gibibytes(2**31) == 2.0


def test_words():
    assert [plural(n, "block") for n in (0, 1, 2000)] == ["0 blocks", "1 block", "2,000 blocks"]
    assert ranges_of([7, 0, 1, 2, 9]) == "0–2, 7, 9"
    assert [power_of_ten(p) for p in (-12, -3, 0, 3, 4)] == ["10⁻¹²", "0.001", "1", "1000", "10⁴"]

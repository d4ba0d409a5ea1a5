"""Contrast of the page's colours as WCAG 2 counts it: 4.5 for text, 3 for what is drawn."""

from __future__ import annotations

import re

import pytest

from ptql.report.style import CSS

LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#[0-9a-fA-F]{6})", part)) for part in CSS.split("@media screen")[:2])


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("front", "back", "least"),
    [
        ("ink", "paper", 7.0),
        ("muted", "paper", 4.5),
        ("muted", "soft", 4.5),
        ("after", "paper", 4.5),
        ("warn", "paper", 4.5),
        ("warn", "warn-soft", 4.5),
        ("ink", "warn-soft", 7.0),
        ("before", "paper", 3.0),
        ("heat", "paper", 4.5),
    ],
)
def test_colours_can_be_told_apart(mode, front, back, least):
    assert contrast(mode[front], mode[back]) >= least


def test_both_modes_have_all_colours():
    assert LIGHT.keys() == DARK.keys()
    assert set(re.findall(r"var\(--([\w-]+)\)", CSS)) <= LIGHT.keys()

"""Sharing a number of bits out among units, each of which takes one of its candidates: least sum of scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Candidate(NamedTuple):
    """A choice that a unit has.

    Args:
        bits: What it takes.
        score: What it does to the result; less is better.
    """

    bits: int
    score: float


class _Step(NamedTuple):
    """From one candidate of a unit to a later one on its hull."""

    gain: float
    unit: int
    before: int
    after: int


def allocate(units: Sequence[Sequence[Candidate]], total: int) -> list[int]:
    """The candidate of each unit, by index, with which all take at most `total` bits and the scores add up to little.

    A multiple-choice knapsack. Every unit begins with its smallest candidate. Steps along the lower convex hulls of
    units are taken in the order of what a bit gains, which is the optimum for every total at which a step just fits
    (Lagrange); what does not fit is left out. Then single units are bettered with the bits that are left. The sum is
    at most the gain of one step above the optimum. Ties go to the earlier unit, so that the result is one.

    Raises:
        ValueError: `total` is less than the smallest candidates take.
    """
    hulls = [_hull(unit) for unit in units]
    chosen = [hull[0] for hull in hulls]
    left = total - sum(unit[index].bits for unit, index in zip(units, chosen, strict=True))
    if left < 0:
        raise ValueError(f"total={total}: the smallest candidates take {total - left} bits; give as many")
    steps = [
        _Step(_gain(units[unit][before], units[unit][after]), unit, before, after)
        for unit, hull in enumerate(hulls)
        for before, after in pairwise(hull)
    ]
    for step in sorted(steps, key=lambda step: -step.gain):  # of one unit they come in order: a hull's gains fall
        more = units[step.unit][step.after].bits - units[step.unit][step.before].bits
        if chosen[step.unit] == step.before and more <= left:
            chosen[step.unit] = step.after
            left -= more
    while (best := _best_change(units, chosen, left)) is not None:
        unit, index = best
        left -= units[unit][index].bits - units[unit][chosen[unit]].bits
        chosen[unit] = index
    return chosen


def _hull(unit: Sequence[Candidate]) -> list[int]:
    """The candidates on the lower convex hull, from the smallest to the one with the least score."""
    hull: list[int] = []
    for index in sorted(range(len(unit)), key=lambda index: (unit[index], index)):
        if hull and unit[index].score >= unit[hull[-1]].score:
            continue
        while len(hull) > 1 and _gain(unit[hull[-2]], unit[hull[-1]]) <= _gain(unit[hull[-1]], unit[index]):
            hull.pop()
        hull.append(index)
    return hull


def _gain(before: Candidate, after: Candidate) -> float:
    """What a bit takes off the score."""
    return (before.score - after.score) / (after.bits - before.bits)


def _best_change(units: Sequence[Sequence[Candidate]], chosen: list[int], left: int) -> tuple[int, int] | None:
    """The unit and its candidate that lower the sum most, with `left` bits more; None if none does."""
    best, most = None, 0.0
    for place, (unit, now) in enumerate(zip(units, chosen, strict=True)):
        for index, candidate in enumerate(unit):
            less = unit[now].score - candidate.score
            if candidate.bits - unit[now].bits <= left and less > most:
                best, most = (place, index), less
    return best


def evenly_spread(count: int, places: int) -> list[int]:
    """`count` of so many places, in order, as far from each other as they can be: of 5 the second and the fourth."""
    return [(2 * k + 1) * places // (2 * count) for k in range(count)]


def scores(
    errors: Sequence[Sequence[float]], harm: Sequence[float], by: Sequence[float], least: float, most: float
) -> list[list[float]]:
    """What each candidate of each unit does to the result, taken to grow as its error does.

    harm / error is much the same for most units, and measured once; a few are far from it.

    Args:
        errors: Of each unit, with each candidate, whatever they are measured in.
        harm: What an error of each unit did, in the units of the result.
        by: That error.
        least: A unit's harm / error counts for at least so many times what is usual, the median.
        most: For at most so many times. With 1 and 1, errors alone count.
    """
    factors = [did / error if error else 0.0 for did, error in zip(harm, by, strict=True)]
    usual = max(statistics.median(factors), 0.0) or 1.0
    bounded = [min(max(factor, least * usual), most * usual) for factor in factors]
    return [[factor * error for error in unit] for factor, unit in zip(bounded, errors, strict=True)]

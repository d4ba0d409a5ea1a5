"""Bits shared out among units, against every combination there is."""

from __future__ import annotations

import itertools
import random

import pytest

from ptql.functional.allocation import Candidate, allocate, evenly_spread, scores

Units = list[list[Candidate]]
SEEDS = range(12)


def some_units(seed: int, count: int = 3) -> Units:
    """Units of two to five candidates; errors that fall with the bits, most of the time."""
    draw = random.Random(seed)
    units = []
    for _ in range(count):
        weight, widths = draw.randint(1, 9), sorted(draw.sample(range(1, 9), draw.randint(2, 5)))
        scale = draw.lognormvariate(0, 2)
        scores = [scale * 4.0**-bits * draw.uniform(0.3, 3) for bits in widths]
        units.append([Candidate(weight * bits, score) for bits, score in zip(widths, scores, strict=True)])
    return units


def taken(units: Units, chosen: list[int]) -> tuple[int, float]:
    """Bits and score of a choice."""
    picked = [unit[index] for unit, index in zip(units, chosen, strict=True)]
    return sum(c.bits for c in picked), sum(c.score for c in picked)


def best_of_all(units: Units, total: int) -> float:
    every = (taken(units, list(chosen)) for chosen in itertools.product(*(range(len(unit)) for unit in units)))
    return min(score for bits, score in every if bits <= total)


def range_of(units: Units) -> range:
    """Totals from the least that is needed to more than all can use."""
    return range(sum(min(unit).bits for unit in units), sum(max(unit).bits for unit in units) + 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_never_over_the_total_and_within_one_step_of_the_optimum(seed: int) -> None:
    """A step of a hull is worth at most what lies between a unit's first and least score."""
    units = some_units(seed)
    step = max(min(unit).score - min(c.score for c in unit) for unit in units)
    for total in range_of(units):
        bits, score = taken(units, allocate(units, total))
        assert bits <= total
        best = best_of_all(units, total)
        assert best <= score <= best + step


@pytest.mark.parametrize("seed", SEEDS)
def test_optimal_where_a_step_just_fits(seed: int) -> None:
    """Of convex units of one size with widths 1, 2, 3 … every total is such a one."""
    draw = random.Random(seed)
    units = [
        [Candidate(bits, scale * 4.0**-bits) for bits in range(1, 5)]
        for scale in (draw.lognormvariate(0, 2) for _ in range(4))
    ]
    for total in range_of(units):
        assert taken(units, allocate(units, total))[1] == pytest.approx(best_of_all(units, total), rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_left_that_would_better_a_unit(seed: int) -> None:
    units = some_units(seed, count=12)
    for total in range_of(units):
        chosen = allocate(units, total)
        left = total - taken(units, chosen)[0]
        for unit, index in zip(units, chosen, strict=True):
            assert not any(c.bits - unit[index].bits <= left and c.score < unit[index].score for c in unit)


def test_with_all_the_bits_each_unit_has_its_least_score() -> None:
    units = some_units(1, count=12)
    chosen = allocate(units, 10**6)
    assert [unit[i].score for unit, i in zip(units, chosen, strict=True)] == [min(c.score for c in u) for u in units]


def test_more_bits_that_better_nothing_are_not_taken() -> None:
    assert allocate([[Candidate(2, 1.0), Candidate(3, 1.0), Candidate(4, 2.0)]], 100) == [0]


def test_of_candidates_that_take_as_much_the_better_is_taken() -> None:
    assert allocate([[Candidate(2, 1.0), Candidate(2, 0.5), Candidate(3, 0.5)]], 2) == [1]


def test_ties_go_to_the_earlier_unit() -> None:
    unit = [Candidate(1, 1.0), Candidate(2, 0.5)]
    assert allocate([unit] * 4, 6) == [1, 1, 0, 0]


def test_units_twice_as_large_get_what_their_scores_are_worth() -> None:
    """Two units of the same error per weight are treated alike, whatever their size."""
    small = [Candidate(bits * 10, 4.0**-bits) for bits in (2, 3, 4)]
    large = [Candidate(bits * 20, 2 * 4.0**-bits) for bits in (2, 3, 4)]
    assert allocate([small, large], 90) == [1, 1]


def test_too_few_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="total=3: the smallest candidates take 4 bits"):
        allocate([[Candidate(2, 1.0)], [Candidate(2, 1.0)]], 3)


def test_nothing_to_choose() -> None:
    assert allocate([], 0) == []


# Scores


def test_scores_are_harm_where_it_was_measured_and_grow_as_errors_do() -> None:
    errors, harm = [[8.0, 2.0, 1.0], [4.0, 1.0, 0.5], [40.0, 10.0, 5.0]], [4.0, 3.0, 18.0]
    assert scores(errors, harm, [2.0, 1.0, 10.0], 0.5, 4.0) == [[16.0, 4.0, 2.0], [12.0, 3.0, 1.5], [72.0, 18.0, 9.0]]


def test_what_is_far_from_usual_is_bounded() -> None:
    errors, harm = [[2.0, 1.0]] * 5, [3.0, 3.0, 3.0, 1000.0, 0.0]
    assert scores(errors, harm, [1.0] * 5, 0.5, 4.0)[2:] == [[6.0, 3.0], [24.0, 12.0], [3.0, 1.5]]
    assert scores(errors, harm, [1.0] * 5, 1.0, 1.0) == [[6.0, 3.0]] * 5


def test_a_unit_without_error_or_harm_still_tells_its_candidates_apart() -> None:
    """As where weights lie on the grid of the reference already."""
    errors = [[1.0, 0.0], [1.0, 0.5], [1.0, 0.5]]
    assert scores(errors, [0.0, 1.0, 1.0], [0.0, 0.5, 0.5], 0.5, 4.0)[0] == [1.0, 0.0]
    assert scores([[1.0, 0.5]], [0.0], [0.5], 0.5, 4.0) == [[0.5, 0.25]]


def test_errors_count_where_harm_is_mere_luck() -> None:
    """Among rounded units, rounding one more coarsely may even help."""
    assert scores([[2.0, 1.0]] * 3, [-1.0, -2.0, 1.0], [1.0] * 3, 0.5, 4.0)[0] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("count", "places", "expected"), [(2, 5, [1, 3]), (5, 5, [0, 1, 2, 3, 4]), (1, 5, [2]), (0, 3, [])]
)
def test_places_are_spread_evenly(count: int, places: int, expected: list[int]) -> None:
    assert evenly_spread(count, places) == expected


def test_half_of_the_places_is_every_other_one() -> None:
    assert evenly_spread(15, 30) == list(range(1, 30, 2))
    assert all(len(set(evenly_spread(count, 7))) == count for count in range(8))

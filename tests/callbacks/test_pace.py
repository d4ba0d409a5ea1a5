from __future__ import annotations

import pytest
from ptql.callbacks.pace import Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_nothing_is_known_at_first(clock):
    pace = Pace(clock)
    assert pace.left(30) is None
    clock.now += 5
    assert pace.left(30, 0.001) is None


def test_time_left_follows_the_blocks_that_are_done(clock):
    pace = Pace(clock)
    for _ in range(3):
        clock.now += 20
        assert pace.block_ends(counts=True) == 20
    assert pace.left(10) == pytest.approx(200)


def test_the_block_in_hand_counts_by_its_share(clock):
    pace = Pace(clock)
    clock.now += 10
    assert pace.left(10, 0.25) == pytest.approx(40 * 9.75)
    clock.now += 30
    pace.block_ends(counts=True)
    clock.now += 20
    assert pace.left(9, 0.5) == pytest.approx(40 * 8.5)


def test_blocks_that_were_finished_earlier_do_not_count(clock):
    pace = Pace(clock)
    for _ in range(20):
        clock.now += 1
        pace.block_ends(counts=False)
    assert pace.left(10) is None
    clock.now += 60
    pace.block_ends(counts=True)
    assert pace.left(9) == pytest.approx(540)


def test_a_block_that_goes_on_counts_only_from_there(clock):
    pace = Pace(clock)
    pace.block_begins_at(0.5)
    clock.now += 10
    assert pace.left(2, 0.75) == pytest.approx(40 * 1.25)
    clock.now += 100  # reading and encoding are in it: no measure for whole blocks
    pace.block_ends(counts=True)
    assert pace.left(1) is None

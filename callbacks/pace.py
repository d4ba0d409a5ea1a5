"""How fast this process gets through blocks, and how long those that are left will take."""

from __future__ import annotations

from collections.abc import Callable

ENOUGH = 0.02  # blocks that must be done before an estimate is worth showing


class Pace:
    """Time left, from the blocks that this process did and the part of the block in hand that is done.

    Blocks that an earlier process finished pass quickly and do not count.

    Args:
        clock: Seconds, from whenever.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mark = clock()
        self._seconds = self._began_at = 0.0
        self._blocks = 0

    def block_begins_at(self, share: float) -> None:
        """This much of the block in hand (0 to 1) was done by an earlier process."""
        self._began_at = share

    def block_ends(self, counts: bool) -> float:
        """A block is finished, by this process if it counts; seconds since the last one."""
        now = self._clock()
        passed, self._mark = now - self._mark, now
        if counts and not self._began_at:  # the rest of a block says little: reading and encoding are in it, too
            self._seconds += passed
            self._blocks += 1
        self._began_at = 0.0
        return passed

    def left(self, blocks: int, share: float = 0.0) -> float | None:
        """Seconds for so many blocks, the one in hand (of which `share` is done) included; None if not known yet."""
        inside = max(share - self._began_at, 0.0)
        done = self._blocks + inside
        if done < ENOUGH:
            return None
        seconds = self._seconds + (self._clock() - self._mark if inside else 0.0)
        return max(seconds / done * (blocks - share), 0.0)

"""Axes: where a value lies between the ends, and which values get a label."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ptql.report.numbers import figure, power_of_ten


@dataclass(frozen=True)
class Axis:
    """An axis of values.

    Args:
        low: Value at its beginning.
        high: Value at its end.
        log: Whether powers of ten are equally far apart.
        ticks: Values with a label.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """Where `value` lies, 0 at the beginning and 1 at the end; what lies beyond is at the end it is beyond."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            share = (math.log(max(value, self.low)) - low) / (high - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)


def log_axis(values: Iterable[float]) -> Axis:
    """A logarithmic axis around the finite values above zero; a linear one from zero if there is none."""
    found = [v for v in values if 0 < v < math.inf]
    if not found:
        return linear_axis(values)
    first, last = math.log10(min(found)), math.log10(max(found))
    margin = max((last - first) * 0.06, 0.01)
    low, high = 10.0 ** max(first - margin, -305.0), 10.0 ** min(last + margin, 305.0)
    return Axis(low, high, True, _log_ticks(low, high))


def linear_axis(values: Iterable[float]) -> Axis:
    """An axis from zero, or from the least value if that is negative, to above the largest finite one."""
    found = [v for v in values if math.isfinite(v)] or [1.0]
    low, high = min(0.0, *found), max(0.0, *found)
    high = high + (high - low) * 0.06 if high > low else low + 1.0
    return Axis(low, high, False, tuple((v, figure_of_tick(v)) for v in _even_ticks(low, high)))


def index_ticks(count: int, most: int = 10) -> list[int]:
    """Which of the indices 0 to count - 1 get a label: evenly spaced, round numbers, at most about `most`."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if count <= s * most)
    return list(range(0, count, step))


def channel_ticks(count: int, most: int = 4) -> list[int]:
    """Round channel numbers below `count`, about `most` of them."""
    return sorted({round(v) for v in _even_ticks(0.0, float(max(count - 1, 1)), most) if v < count - 0.5})


def figure_of_tick(value: float) -> str:
    """A tick's label, without trailing zeros."""
    text = figure(value, 3)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    powers = list(range(first, last + 1))
    if len(powers) >= 3:
        step = math.ceil(len(powers) / 7)
        return tuple((10.0**p, power_of_ten(p)) for p in powers if p % step == 0)
    for steps in ((1, 3), (1, 2, 5)):
        ticks = [m * 10.0**p for p in range(first - 1, last + 1) for m in steps if low <= m * 10.0**p <= high]
        if len(ticks) >= 3:
            return tuple((v, figure_of_tick(v)) for v in ticks)
    return tuple((v, figure_of_tick(v)) for v in _even_ticks(low, high) if v > 0)


def _even_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between the ends."""
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

"""Numbers as people read them: few digits, units, and words for what is no number."""

from __future__ import annotations

import math
from typing import Any

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def real(value: Any) -> float:
    """A value out of a JSON file as a float: "nan" and "inf" are what they say, anything else that is none is nan."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def figure(value: Any, digits: int = 4) -> str:
    """`value` with so many significant digits; powers of ten for what is very small or large."""
    x = real(value)
    if not math.isfinite(x):
        return str(x)
    if x == 0:
        return "0"
    if not 1e-3 <= abs(x) < 1e6:
        mantissa, _, exponent = f"{x:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{x:,.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def power_of_ten(exponent: int) -> str:
    """10 to a whole power, as an axis has it: 0.001, 1, 1000, and 10⁴ from there on."""
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def duration(seconds: float | int) -> str:
    """A time in its two largest units: "3 min 20 s"."""
    if not math.isfinite(seconds):
        return "?"
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    left, parts = max(0, round(seconds)), []
    for unit, size in UNITS:
        count, left = divmod(left, size)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count) or "0 s"


def megabytes(count: float | int) -> str:
    """Bytes as disks are sold: 101 MB, 7.30 GB."""
    if not math.isfinite(count):
        return "?"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{figure(count / size, 3)} {unit}"
    return f"{count:.0f} bytes"


def gibibytes(count: float | int) -> float:
    """Bytes of memory in GiB."""
    return count / 2**30


def plural(count: int, noun: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def ranges_of(indices: list[int]) -> str:
    """Sorted whole numbers with runs drawn together: `0–3, 7`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)

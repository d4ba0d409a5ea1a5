"""The four kinds of parts that a recipe is made of: transforms, weight and activation quantisers, objectives."""

from __future__ import annotations

import sys
from typing import Any

from ptql.errors import check_number

HIGHEST_RATE = 10.0


def settings(part: object) -> dict[str, Any]:
    """Class and settings of a part, for a run's fingerprint. Parts keep their arguments under the same names."""
    return {"class": type(part).__name__, **vars(part)}


def check_learning_rate(lr: float, remedy: str) -> None:
    """Raise `InputError` unless a part can learn with this rate."""
    rule = f"a learning rate is at most {HIGHEST_RATE:g} and above 0; {remedy}"
    check_number("lr", lr, sys.float_info.min, HIGHEST_RATE, rule)

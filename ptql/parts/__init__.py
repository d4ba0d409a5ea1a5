"""The four kinds of parts that a recipe is made of: transforms, weight and activation quantisers, objectives."""

from __future__ import annotations

from typing import Any


def settings(part: object) -> dict[str, Any]:
    """Class and settings of a part, for a run's fingerprint. Parts keep their arguments under the same names."""
    return {"class": type(part).__name__, **vars(part)}

"""The model families that ptql knows, by the `model_type` of their configuration."""

from __future__ import annotations

from ptql.errors import InputError
from ptql.families.base import AttentionSites, BlockLayout, Family, NormSite
from ptql.families.llama import LLAMA
from ptql.families.opt import OPT

FAMILIES: dict[str, Family] = {"llama": LLAMA, "opt": OPT}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`; `InputError` with the known ones otherwise."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"model_type={model_type!r}: this family is not known; give a model of one of: {known}")
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "AttentionSites", "BlockLayout", "Family", "NormSite", "family_of"]

"""The model families that ptql knows, by the `model_type` of their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptql.errors import InputError
from ptql.families.base import AttentionSites, BlockLayout, Family, HeadNorms, MlpSite, NormSite, Rows
from ptql.families.gemma import GEMMA2, GEMMA3_TEXT
from ptql.families.llama import LLAMA, MISTRAL, QWEN2
from ptql.families.opt import OPT
from ptql.families.phi3 import PHI3
from ptql.families.qwen3 import QWEN3
from ptql.families.refused import refuse

FAMILIES: dict[str, Family] = {
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`; `InputError` with the known ones otherwise."""
    if model_type not in FAMILIES:
        raise InputError(f"model_type={model_type!r}: this family is not known; give a model of one of: {_known()}")
    return FAMILIES[model_type]


def family_for(settings: Mapping[str, Any]) -> Family:
    """The family of a config.json; `InputError` for what is no dense language model of a known one."""
    refuse(settings, _known())
    return family_of(settings.get("model_type") or "")


def _known() -> str:
    return ", ".join(sorted(FAMILIES))


__all__ = [
    "FAMILIES",
    "AttentionSites",
    "BlockLayout",
    "Family",
    "HeadNorms",
    "MlpSite",
    "NormSite",
    "Rows",
    "family_for",
    "family_of",
]

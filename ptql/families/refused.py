"""Models that are refused by name at the start: mixtures of experts, and wrappers of more than a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptql.errors import InputError

# As the configurations of transformers call the number of experts; a dense model has none of them, or 0 or 1.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
# The parts of a multimodal model, each with a configuration of its own.
PARTS = (
    "text_config",
    "language_config",
    "llm_config",
    "thinker_config",
    "vision_config",
    "audio_config",
    "speech_config",
)


def refuse(settings: Mapping[str, Any], known: str) -> None:
    """Raise `InputError` for a config.json of a model that is no dense language model.

    Args:
        settings: What config.json holds.
        known: The model types that can be given instead, for the message.
    """
    name = settings.get("model_type")
    if parts := [key for key in PARTS if isinstance(settings.get(key), Mapping)]:
        hint = " (gemma3_text for Gemma 3)" if name == "gemma3" else ""
        raise InputError(
            f"model_type={name!r}: a multimodal wrapper (it has {', '.join(parts)}), of which ptql quantises no part; "
            f"save its language model by itself{hint}, or give a model of one of: {known}"
        )
    if (found := _experts(settings)) is not None:
        raise InputError(
            f"model_type={name!r} with {found}: a mixture of experts, whose stacked matrices can't be quantised yet; "
            f"give a dense model of one of: {known}"
        )


def _experts(settings: Mapping[str, Any]) -> str | None:
    """Which setting says that there are experts, as in config.json; None if none does."""
    nested = [value for value in settings.values() if isinstance(value, Mapping)]  # DBRX has an `ffn_config`
    for level in (settings, *nested):
        for key in EXPERTS:
            # Some have a number for each block.
            values = level[key] if isinstance(level.get(key), list) else [level.get(key)]
            if any(isinstance(value, int) and value > 1 for value in values):
                return f"{key}={level[key]}"
    return None

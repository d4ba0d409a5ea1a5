"""Models that are no dense language model, refused by name in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.families import FAMILIES, family_for
from tests.models import CONFIGS

MIXTURES: dict[str, dict[str, Any]] = {  # as in the config.json of published models
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 60},
    "qwen3_moe": {"num_experts": 128},
    "deepseek_v2": {"n_routed_experts": 64},
    "deepseek_v3": {"n_routed_experts": 256},
    "gpt_oss": {"num_local_experts": 32},
    "phimoe": {"num_local_experts": 16},
    "olmoe": {"num_experts": 64},
    "llama4_text": {"num_local_experts": 16},
    "ernie4_5_moe": {"moe_num_experts": [64, 64]},
    "dbrx": {"ffn_config": {"moe_num_experts": 16}},
    "granitemoe": {"num_local_experts": 40},
    "jamba": {"num_experts": 16},
    "llama": {"num_local_experts": 4},
}
WRAPPERS: dict[str, tuple[str, ...]] = {
    "gemma3": ("text_config", "vision_config"),
    "llama4": ("text_config", "vision_config"),
    "llava": ("text_config", "vision_config"),
    "mistral3": ("text_config", "vision_config"),
    "qwen2_vl": ("vision_config",),
    "qwen2_5_omni": ("thinker_config",),
    "phi4_multimodal": ("vision_config", "audio_config"),
    "mllama": ("text_config", "vision_config"),
}


def refused(settings: dict[str, Any], directory: Path) -> str:
    """The line with which the configuration is refused, alone and as a directory."""
    with pytest.raises(InputError) as error:
        family_for(settings)
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError) as again:
        Checkpoint(directory)
    assert str(error.value) == str(again.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"one of: {', '.join(sorted(FAMILIES))}")
    return str(error.value)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts_are_refused_by_name(tmp_path: Path, name: str) -> None:
    line = refused({"model_type": name, **MIXTURES[name]}, tmp_path)
    (value,) = MIXTURES[name].values()
    key, number = next(iter(value.items())) if isinstance(value, dict) else (next(iter(MIXTURES[name])), value)
    assert line.startswith(f"model_type='{name}' with {key}={number}: a mixture of experts, whose stacked matrices")
    assert "give a dense model" in line


@pytest.mark.parametrize("name", WRAPPERS)
def test_multimodal_wrappers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    parts: dict[str, Any] = {part: {"hidden_size": 8, "num_experts": 4} for part in WRAPPERS[name]}
    line = refused({"model_type": name, **parts}, tmp_path)
    assert line.startswith(f"model_type='{name}': a multimodal wrapper (it has {', '.join(WRAPPERS[name])})")
    assert "save its language model by itself" in line
    assert ("gemma3_text for Gemma 3" in line) == (name == "gemma3")


@pytest.mark.parametrize("experts", [0, 1, None, False, True])
def test_no_expert_or_one_is_a_dense_model(experts: Any) -> None:
    settings = {"model_type": "llama", "num_local_experts": experts, "rope_scaling": {"factor": 8}}
    assert family_for(settings) is FAMILIES["llama"]


@pytest.mark.parametrize("name", CONFIGS)
def test_known_models_are_not_refused(name: str) -> None:
    settings = json.loads(CONFIGS[name].to_json_string(use_diff=False))
    assert family_for(settings) is FAMILIES[CONFIGS[name].model_type]


@pytest.mark.parametrize("settings", [{}, {"model_type": None}, {"model_type": "bert"}])
def test_others_are_not_known(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"model_type='(bert)?': this family is not known; give a model of one of:"):
        family_for(settings)

"""Packed models as transformers loads them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(directory: Path, dtype: torch.dtype = torch.float32, **kwargs) -> PreTrainedModel:
    """The packed model, every tensor of the directory used and none made up."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model

"""The whole model in memory, for tasks: on one device if it fits, else spread over GPUs, host and disk."""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptql.checkpoint import Checkpoint
from ptql.formats.ptql import unpack_block
from ptql.nn import attention

SHARE = 0.8  # of a device's free memory that weights may take; the rest is for activations
FLOAT = 4  # bytes of a float32
# The attention that perplexity is measured with: others may leave out a cap on the scores.
_OPTIONS: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "attn_implementation": attention.NAME}


def load_whole(model: Checkpoint, device: torch.device) -> PreTrainedModel:
    """The causal language model in float32, ready for evaluation.

    On `device` with its packed layers unpacked once, where that fits; else packed, spread by accelerate over all
    GPUs, then host memory, then a scratch folder on the disk, layer by layer.
    """
    if fits(model, device):
        attention.register()
        whole = AutoModelForCausalLM.from_pretrained(model.directory, **_OPTIONS)
        unpack_block(whole)  # once, instead of at every call
        return whole.to(device).eval()  # type: ignore[arg-type]
    return spread(model)


def spread(model: Checkpoint, max_memory: dict[int | str, int | str] | None = None) -> PreTrainedModel:
    """The model over all devices; `max_memory` in bytes a device, as accelerate takes it, None for what is free."""
    attention.register()
    folder = tempfile.TemporaryDirectory(prefix="ptql-offload-")
    parted = AutoModelForCausalLM.from_pretrained(
        model.directory,
        **_OPTIONS,
        device_map="auto",
        max_memory=max_memory,
        offload_folder=folder.name,
    ).eval()
    weakref.finalize(parted, folder.cleanup)
    return parted


def fits(model: Checkpoint, device: torch.device) -> bool:
    """Whether all weights in float32 leave room on the device."""
    if device.type != "cuda":
        return True
    return model.parameters * FLOAT < SHARE * torch.cuda.mem_get_info(device)[0]

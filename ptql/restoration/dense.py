"""A whole causal language model, its quantised matrices multiplied out, block by block from a model directory."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptql.checkpoint import Checkpoint
from ptql.formats.ptql import PackedFormat

HEAD = "lm_head.weight"
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "embd_pdrop", "resid_pdrop", "layerdrop")


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers (RoPE's) real, layers plain ones."""
    config = copy.deepcopy(checkpoint.config)
    vars(config).pop("quantization_config", None)
    for name in DROPOUTS:  # OPT has some; what is dropped while LoRA learns is LoRA's setting alone
        if hasattr(config, name):
            setattr(config, name, 0.0)
    own = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"  # SDPA leaves caps out
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=own).train()


def block_tensors(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    """The parameters of a block in float32, by name in the block; quantised matrices are dense."""
    return dict(checkpoint.block(index).state_dict())


def outside_tensors(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters of `model` that belong to no block, by name; of tied ones the first."""
    blocks = checkpoint.family.blocks + "."
    names = [name for name, _ in model.named_parameters() if not name.startswith(blocks)]
    if getattr(checkpoint.config, "tie_word_embeddings", False):  # not tied yet on the meta device
        names = [name for name in names if name != HEAD]
    return dict(checkpoint.read(names))


def dense_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the dense model by the name in a file, those of blocks in float32, one block in memory."""
    for index in range(checkpoint.num_blocks):
        for name, tensor in block_tensors(checkpoint, index).items():
            yield f"{checkpoint.family.blocks}.{index}.{name}", tensor
    yield from checkpoint.read(checkpoint.outside_names())


def why_not_dense(fmt: PackedFormat) -> str | None:
    """What a plain model of the family has no place for; None if it has one for everything."""
    if fmt.gathered_norms or fmt.static is not None:
        return "channels in an order of their own, and activations on fixed grids"
    added = [*fmt.shifted_norms, *fmt.added_biases]
    return f"biases that the family does not have ({', '.join(added)})" if added else None

"""True size: bits per weight from the bytes that are stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from ptql.checkpoint import BITS, Checkpoint
from ptql.formats.ptql import PackedFormat, prepare_block
from ptql.nn.packed_linear import Packed


def model_size(model: Path, source: Checkpoint) -> dict[str, float | int]:
    """Stored bits of the packed directory `model`, over the weights that `source` has.

    Returns:
        `bits_per_weight`: everything stored for the quantised linear layers (codes, scales, zero points, added
        and own biases) over their weights; `bits_per_weight_with_embeddings`: all tensors over all parameters;
        `size_bytes`: the weight files on disk; `weights`, `parameters`: the counts behind the two.
    """
    blocks = (source.family.blocks, source.family.blocks.removeprefix("model."))  # some OPT files use the short form
    prefixes = tuple(
        f"{path}.{index}.{name}."
        for path in blocks
        for index in range(source.num_blocks)
        for name in source.layout.names
    )
    stored_linear = stored = 0
    for file in model.glob("*.safetensors"):
        for name, bits in _tensor_bits(file):
            stored += bits
            stored_linear += bits if name.startswith(prefixes) else 0
    weights = parameters = 0
    for file in set(source.files.values()):
        for name, count in _tensor_counts(file):
            parameters += count
            weights += count if name.startswith(prefixes) and name.endswith(".weight") else 0
    return {
        "bits_per_weight": stored_linear / weights,
        "bits_per_weight_with_embeddings": stored / parameters,
        "size_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "weights": weights,
        "parameters": parameters,
    }


class LayerSize(NamedTuple):
    """What a quantised linear layer takes.

    Args:
        bits: Of all that is stored for it: codes, scales, zero points, factors, bias.
        weights: Of the source.
    """

    bits: int
    weights: int


def layer_sizes(source: Checkpoint, fmt: PackedFormat) -> dict[str, LayerSize]:
    """What each quantised layer of a model that is packed like this will take, by `INDEX.LINEAR`.

    Their bits over their weights are the `bits_per_weight` of `model_size`.
    """
    found, dense = {}, source.dtype()
    for index in range(source.num_blocks):
        block = source.empty_block(index)
        weights = {name: block.get_parameter(f"{name}.weight").numel() for name in fmt.linears}
        prepare_block(block, fmt, index)
        for name, count in weights.items():
            found[f"{index}.{name}"] = LayerSize(_bits_of(block.get_submodule(name), dense), count)
    return found


def _bits_of(layer: torch.nn.Module, dense: torch.dtype) -> int:
    """Of its tensors as `BlockTask.encode` gives them: biases are float16 where the matrix is packed."""
    floats = {"weight": dense, "bias": torch.float16 if isinstance(layer, Packed) else torch.float32}
    return sum(
        tensor.numel() * 8 * (floats[name] if tensor.is_floating_point() else tensor.dtype).itemsize
        for name, tensor in layer.state_dict().items()
    )


def _tensor_counts(file: Path) -> list[tuple[str, int]]:
    with safe_open(file, "pt") as tensors:
        return [(name, math.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys()]  # noqa: SIM118


def _tensor_bits(file: Path) -> list[tuple[str, int]]:
    with safe_open(file, "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return [(name, math.prod(s.get_shape()) * BITS[s.get_dtype()]) for name, s in slices.items()]

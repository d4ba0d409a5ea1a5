"""Lets vLLM read packed models: what it can multiply, as tensors of its own `pack-quantized` layers.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). This file holds what can be said
without vLLM; the classes that it wants are in `vllm_config` and `vllm_layers`, which alone import it. They are written
after the source of vLLM 0.33.0 and have not run under vLLM: `ptql export --format compressed-tensors` makes a
directory that needs none of this.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int16, Int32, UInt8
from torch import Tensor

from ptql.errors import InputError
from ptql.export.refusals import refuse_activations, refuse_additions, refuse_kinds
from ptql.export.words import stream_words, words
from ptql.formats.ptql import PackedFormat
from ptql.functional.packing import unpack
from ptql.recipe import IntScheme

# axes: out, in = weight rows, columns; g = groups of columns that share a scale; bytes, words = of a row's stream

TARGET = "vLLM"
RENAMED = {".codes": ".weight_packed", ".scale": ".weight_scale", ".zero": ".weight_zero_point"}
"""Ends of the names of stored tensors, as vLLM's layer has them."""
EXPORT = "serve what `ptql export RUN --format compressed-tensors` writes"


def register() -> None:
    """Make `quant_method: ptql` known to vLLM. Calling it again is harmless.

    A vLLM that this was not written for is left as it is, with a warning: an error would end it, whatever it serves.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from ptql.formats.vllm_config import ServedConfig
    except ImportError as error:
        logging.getLogger(__name__).warning("ptql: not the vLLM that its plug-in knows (%s); %s", error, EXPORT)
        return
    register_quantization_config("ptql")(ServedConfig)


def served_format(stored: Mapping[str, Any]) -> PackedFormat:
    """`quantization_config` of a model that vLLM's weight-only layers can multiply.

    Raises:
        InputError: It says more than they can do: rounded activations or attention, biases of learned shifts, factors,
            scales of clusters, codes that are not plain integers of 2 to 8 bits. The text says what to do.
    """
    fmt = PackedFormat.from_dict(stored)
    refuse_additions(fmt, TARGET)
    refuse_activations(fmt, TARGET)
    refuse_kinds(fmt, TARGET)
    for scheme in (fmt.weight, *fmt.layers.values()):
        if scheme.bits == 1:
            raise InputError(f"{TARGET}: no kernel reads codes of 1 bit; fit with 2 bits or more")
    return fmt


def scheme_of(fmt: PackedFormat, prefix: str, fused: Mapping[str, Sequence[str]]) -> IntScheme | None:
    """The format of the layer that vLLM calls `prefix`; None if it is not packed.

    Args:
        fmt: Of the model.
        prefix: `model.layers.0.self_attn.qkv_proj`, say.
        fused: Which layers vLLM makes one of: `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`.

    Raises:
        InputError: Layers that vLLM makes one of have several formats.
    """
    place = re.search(r"(?:^|\.)(\d+)\.(.+)$", prefix)
    if place is None:
        return None
    index, name = int(place[1]), place[2]
    parent, dot, last = name.rpartition(".")
    members = [f"{parent}{dot}{part}" for part in fused.get(last, [last])]
    if not set(members) <= set(fmt.linears):
        return None
    found = {fmt.schemes.of(index, member) for member in members}
    if len(found) > 1:
        raise InputError(
            f"{TARGET}: {', '.join(members)} are one layer there, and have several formats in block {index}; let "
            "--model.layers name them together"
        )
    (scheme,) = found
    return scheme if scheme.quantised else None


@dataclass(frozen=True)
class Part:
    """The part of a layer that one process of vLLM holds.

    Args:
        name: What vLLM calls the layer.
        columns: Of the whole matrix.
        own_columns: Of this part.
        all_rows: Of the whole layer.
        rows: Of each matrix that is fused into the layer, in this part.
        dtype: Of scales.
    """

    name: str
    columns: int
    own_columns: int
    all_rows: int
    rows: tuple[int, ...]
    dtype: torch.dtype


def check_part(part: Part, scheme: IntScheme) -> None:
    """Raise `InputError` unless vLLM's tensors hold this part of a layer, each number as it is stored."""
    if part.dtype == torch.bfloat16 and scheme.scale_dtype != "bfloat16":
        raise InputError(
            f"dtype=bfloat16: {TARGET} has scales in it, and those of {part.name} are float16 numbers, of which it "
            "would keep 8 of 11 digits; use --dtype float16, or fit with --model.weight.scale_dtype bfloat16"
        )
    group = scheme.columns(part.columns)
    if part.columns % group:
        raise InputError(
            f"{TARGET} has groups of one size, and {part.columns} columns of {part.name} are no multiple of "
            f"{group}; fit with another --model.weight.group_size, or -1"
        )
    split = part.own_columns != part.columns
    if split and (part.own_columns * scheme.bits % 32 or (scheme.group_size != -1 and part.own_columns % group)):
        raise InputError(
            f"{part.name}: {part.own_columns} columns for each process are no whole groups of {group} in words of 32 "
            "bits; use a smaller --tensor-parallel-size"
        )
    cut = part.rows != (part.all_rows,)
    if not scheme.symmetric and cut and any(rows * scheme.bits % 32 for rows in part.rows):
        raise InputError(
            f"{part.name}: zero points of {', '.join(map(str, part.rows))} rows of {scheme.bits} bits don't fill "
            f"words of 32 bits; use a smaller --tensor-parallel-size, or {EXPORT}"
        )


def served_codes(codes: UInt8[Tensor, "out bytes"]) -> Int32[Tensor, "out words"]:
    """`weight_packed`: the stored stream itself, in words."""
    return stream_words(codes)


def served_scale(scale: Int16[Tensor, "out g"]) -> Float[Tensor, "out g"]:
    """`weight_scale`: the float16 numbers whose bits are stored."""
    return scale.view(torch.float16)


def served_zero(zero: UInt8[Tensor, "out bytes"], bits: int, groups: int) -> Int32[Tensor, "words {groups}"]:
    """`weight_zero_point`: packed along the rows, where ptql packs along the groups."""
    return words(unpack(zero, bits, groups).T.contiguous(), bits).T.contiguous()

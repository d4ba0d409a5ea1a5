"""Codes of vectors that are rounded one by one, each on its own grid: what a cache of keys and values stores.

Source: KIVI (arXiv 2402.02750) section 3 for the per-token form; the rule is that of `fake_quantize_tokens`.
"""

# axes: tokens = any axes before the last; n = elements of a vector

from __future__ import annotations

import torch
from jaxtyping import Float, Float16, Int16, UInt8
from torch import Tensor

from ptql.functional.affine import LARGEST_SCALE, SMALLEST_SCALE
from ptql.functional.packing import pack, packed_bytes, unpack

FARTHEST_ZERO = 2**14
"""Of a zero point: a vector of numbers that are all far from zero has a wider step than it needs. An int16 holds twice
that, as the step is rounded to float16 afterwards."""


def encode_tokens(
    x: Float[Tensor, "*tokens n"], bits: int
) -> tuple[UInt8[Tensor, "*tokens n"], Float16[Tensor, "*tokens 1"], Int16[Tensor, "*tokens 1"]]:
    """Codes, step and zero point of each vector, on its range: value = (code - zero) * scale.

    The step is rounded to float16 before codes are made, so that what is stored is what they were made for.
    """
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    least = torch.maximum(low.abs(), high.abs()) / FARTHEST_ZERO
    scale = ((high - low) / (2**bits - 1)).maximum(least).clamp(SMALLEST_SCALE, LARGEST_SCALE).half()
    step = scale.float()
    zero = (-low / step).round_()
    codes = (wide / step).round_().add_(zero).clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, zero.to(torch.int16)


def decode_tokens(
    codes: UInt8[Tensor, "*tokens n"], scale: Float16[Tensor, "*tokens 1"], zero: Int16[Tensor, "*tokens 1"]
) -> Float[Tensor, "*tokens n"]:
    """The float32 values that `encode_tokens` stored."""
    return (codes.float() - zero.float()).mul_(scale.float())


def pack_tokens(codes: UInt8[Tensor, "*tokens n"], bits: int) -> UInt8[Tensor, "*tokens bytes"]:
    """Each vector of codes as a bit stream, see `ptql.functional.packing`."""
    width = packed_bytes(codes.shape[-1], bits)
    return pack(codes.reshape(-1, codes.shape[-1]), bits).view(*codes.shape[:-1], width)


def unpack_tokens(stream: UInt8[Tensor, "*tokens bytes"], bits: int, n: int) -> UInt8[Tensor, "*tokens n"]:
    """Undo `pack_tokens`; errors as `unpack`."""
    return unpack(stream.reshape(-1, stream.shape[-1]), bits, n).view(*stream.shape[:-1], n)

"""Static rounding of activations: grids found once, one for each cluster of channels, for all tokens alike.

Source: RPTQ (arXiv 2304.01089) section 3, and its quantiser class.
"""

# axes: samples = of calibration; rows = heads, or 1; width = channels of a row; k = clusters of a row; n = channels

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ptql.functional.affine import LARGEST_SCALE, SMALLEST_SCALE

MOMENTUM = 0.99  # of the running range over samples
FAITHFUL_SMALLEST, FAITHFUL_ZERO = 1e-4, 1e4
"""Bounds of the original's scale and zero point."""
FARTHEST_ZERO = 2.0**23
"""Not much farther, codes are no whole numbers in float32 any more."""
SHARES = tuple(1 - 0.03 * step for step in range(21))
"""Of a range, tried by the search for the smallest squared error: 1 down to 0.4."""


class _RoundChannels(torch.autograd.Function):
    """`fake_quantize_channels` with the straight-through gradient: what is clamped has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        code = (x / scale).round_().add_(zero)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((code >= 0) & (code <= top))
        return code.clamp_(0, top).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


def fake_quantize_channels(
    x: Float[Tensor, "*tokens n"], scale: Float[Tensor, "*#tokens n"], zero: Float[Tensor, "*#tokens n"], bits: int
) -> Float[Tensor, "*tokens n"]:
    """Round each channel of `x` on its own fixed grid: (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero) * scale.

    Computed in float32 whatever `x` is, or float64, and returned in `x`'s dtype.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return _RoundChannels.apply(wide, scale.to(wide.dtype), zero.to(wide.dtype), 2**bits - 1).to(x.dtype)


def encode_channels(
    x: Float[Tensor, "*tokens n"], scale: Float[Tensor, "*#tokens n"], zero: Float[Tensor, "*#tokens n"], bits: int
) -> UInt8[Tensor, "*tokens n"]:
    """The codes of `fake_quantize_channels`."""
    return (x.float() / scale).round_().add_(zero).clamp_(0, 2**bits - 1).to(torch.uint8)


def decode_channels(
    codes: UInt8[Tensor, "*tokens n"], scale: Float[Tensor, "*#tokens n"], zero: Float[Tensor, "*#tokens n"]
) -> Float[Tensor, "*tokens n"]:
    """The float32 values that codes of `encode_channels` stand for."""
    return (codes.float() - zero).mul_(scale)


def round_probabilities(shares: Float[Tensor, "*rows keys"], bits: int) -> Float[Tensor, "*rows keys"]:
    """Softmax outputs on 2^bits evenly spaced values from 0 to 1; rounding counts as the identity for the gradient."""
    top, wide = 2**bits - 1, shares if shares.dtype == torch.float64 else shares.float()
    rounded = (wide * top).round() / top
    return shares + (rounded.to(shares.dtype) - shares).detach()


def cluster_ranges(
    low: Float[Tensor, "samples rows width"],
    high: Float[Tensor, "samples rows width"],
    labels: Int[Tensor, "rows width"],
    clusters: int,
) -> tuple[Float[Tensor, "samples rows {clusters}"], Float[Tensor, "samples rows {clusters}"]]:
    """Smallest and largest value of the channels in each cluster; 0 where a row has fewer clusters."""
    index = labels.long().expand(low.shape)
    empty = low.new_zeros(*low.shape[:2], clusters)
    return (
        empty.scatter_reduce(2, index, low, "amin", include_self=False),
        empty.scatter_reduce(2, index, high, "amax", include_self=False),
    )


def running_mean(values: Float[Tensor, "samples rows k"], momentum: float = MOMENTUM) -> Float[Tensor, "rows k"]:
    """Of samples in their order: the first, then momentum * old + (1 - momentum) * new."""
    found = values[0]
    for value in values[1:]:
        found = momentum * found + (1 - momentum) * value
    return found


def static_grid(
    low: Float[Tensor, "*rows k"], high: Float[Tensor, "*rows k"], bits: int, faithful: bool = False
) -> tuple[Float[Tensor, "*rows k"], Float[Tensor, "*rows k"]]:
    """Scale, as rounded to float16, and zero point of ranges, which need not hold zero.

    Ours puts the smallest value on the first code and the largest on the last, 2^bits - 1 steps from each other.
    `faithful` divides the range by 2^bits and centres it on the codes, as the original: the largest value is
    up to a step beyond the last code.
    """
    if faithful:
        scale = ((high - low) / 2**bits).clamp(FAITHFUL_SMALLEST, LARGEST_SCALE).half().to(low.dtype)
        middle = (-(high + low) / 2 / scale).clamp(-FAITHFUL_ZERO, FAITHFUL_ZERO).round()
        return scale, middle + 2 ** (bits - 1)
    scale = ((high - low) / (2**bits - 1)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    # one value far from zero alone: its code must still be a whole number
    scale = scale.maximum(low.abs().maximum(high.abs()) / FARTHEST_ZERO).half().to(low.dtype)
    return scale, (-low / scale).round()


def range_errors(
    x: Float[Tensor, "*tokens rows width"],
    low: Float[Tensor, "rows k"],
    high: Float[Tensor, "rows k"],
    labels: Int[Tensor, "rows width"],
    bits: int,
    faithful: bool = False,
    shares: Sequence[float] = SHARES,
) -> Float[Tensor, "candidates rows k"]:
    """Sum of squared rounding errors in each cluster where both ends of its range are multiplied by each share."""
    index, found = labels.long(), []
    for share in shares:
        scale, zero = static_grid(low * share, high * share, bits, faithful)
        error = fake_quantize_channels(x, scale.gather(1, index), zero.gather(1, index), bits) - x
        by_channel = error.double().square().flatten(0, -3).sum(0)
        found.append(by_channel.new_zeros(low.shape).scatter_add(1, index, by_channel))
    return torch.stack(found)

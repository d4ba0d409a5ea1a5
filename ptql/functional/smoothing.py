"""Folding per-channel scales and shifts into neighbouring layers so that the function stays the same.

With x the input of a consumer y = W x + b: y = (W s) ((x - z) / s) + (b + W z), so the producer of x is
divided by s and shifted by z, and the consumer's columns are multiplied. Source: OmniQuant eq. 3-5 (learnable
equivalent transformation), LRQuant section 3. Products are written as sums, not matrix products, so that
TF32 never touches them.
"""

# axes: out, in = weight rows, columns; c = channels between producer and consumer; p = RoPE pairs and free channels;
# kv = key/value heads; d = head size

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ptql.functional.scaled import Scaled

SMALLEST = 1e-5


def log_activation_scale(absmax: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    """LRQuant's initial scale, a / log2(2 + a) for the largest |activation| a of each channel."""
    peak = absmax.clamp_min(SMALLEST)
    return (peak / torch.log2(2 + peak)).clamp_min(SMALLEST)


def balanced_scale(absmax: Float[Tensor, " c"], weight_peak: Float[Tensor, " c"], alpha: float) -> Float[Tensor, " c"]:
    """SmoothQuant's and OmniQuant's initial scale, a^alpha / w^(1 - alpha)."""
    peak, weight = absmax.clamp_min(SMALLEST), weight_peak.clamp_min(SMALLEST)
    return (peak**alpha / weight ** (1 - alpha)).clamp_min(SMALLEST)


def fold_into_norm(
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"] | None,
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"] | None,
    offset: int = 0,
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"] | None]:
    """Weight and bias of a norm whose output is (old output - shift) / scale. A shift needs a bias.

    The norm multiplies by `offset + weight`.
    """
    if bias is not None:
        bias = (bias if shift is None else bias - shift) / scale
    return (weight + offset) / scale - offset, bias


def fold_into_producer(
    weight: Float[Tensor, "c in"] | Scaled,
    bias: Float[Tensor, " c"] | None,
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"] | None,
) -> tuple[Float[Tensor, "c in"] | Scaled, Float[Tensor, " c"] | None]:
    """A linear layer whose output is (old output - shift) / scale. A shift needs a bias."""
    if bias is not None:
        bias = (bias if shift is None else bias - shift) / scale
    return weight.divide_rows(scale) if isinstance(weight, Scaled) else weight / scale[:, None], bias


def fold_into_consumer(
    weight: Float[Tensor, "out c"] | Scaled,
    bias: Float[Tensor, " out"] | None,
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"] | None,
) -> tuple[Float[Tensor, "out c"] | Scaled, Float[Tensor, " out"] | None]:
    """A linear layer that takes (x - shift) / scale and gives what the old one gave for x. A shift needs a bias."""
    if bias is not None and shift is not None:
        bias = bias + (weight.times(shift) if isinstance(weight, Scaled) else (weight * shift).sum(1))
    return weight.scale_columns(scale) if isinstance(weight, Scaled) else weight * scale, bias


def repeat_heads(x: Float[Tensor, " c"], kv_heads: int, heads: int) -> Float[Tensor, " q"]:
    """One value per key/value channel, repeated for every query head that reads this key/value head."""
    per_head = x.unflatten(0, (kv_heads, 1, -1))  # kv, 1, d
    return per_head.expand(kv_heads, heads // kv_heads, -1).flatten()


def both_of_each_pair(x: Float[Tensor, " p"], heads: int, rotary: int) -> Float[Tensor, " c"]:
    """One value per channel of `heads` heads from one per RoPE pair and one per channel that is not rotated.

    The first `rotary` channels of a head are pairs i and i + rotary / 2, which are rotated into each other.
    """
    per_head = x.unflatten(0, (heads, -1))
    pairs, free = per_head[:, : rotary // 2], per_head[:, rotary // 2 :]
    return torch.cat([pairs, pairs, free], dim=1).flatten()


def keep_away_from_zero(scale: Float[Tensor, " *shape"], smallest: float = 1e-2) -> None:
    """Push |scale| up to `smallest`, in place, keeping the sign; zero counts as positive (OmniQuant's truncation)."""
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
    scale.copy_(torch.where(scale.abs() < smallest, sign * smallest, scale))

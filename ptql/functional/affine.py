"""Uniform affine quantisation: x ~ (code - zero) * scale, with code in 0 .. levels - 1; b bits have 2^b levels.

Source: OmniQuant (ICLR 2024) section 3.2 and its quantiser class; LRQuant and ABQ-LLM use the same one.
"""

# axes: out, in = weight rows, columns; g = groups of columns that share a scale; c = columns of a full group

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

SMALLEST_SCALE = 1e-6  # still a number in float16, the dtype in which scales are stored
LARGEST_SCALE = 1e4


class _RoundClamp(torch.autograd.Function):
    """`fake_quantize` with the straight-through gradient written out: 7 kernels instead of autograd's 30."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        ratio = x / scale
        code = ratio.round().add_(zero)
        inside = (code >= 0) & (code <= top)
        code.clamp_(0, top).sub_(zero)
        ctx.save_for_backward(inside, code - ratio.mul_(inside))
        return code.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        inside, by_scale = ctx.saved_tensors
        (grad,) = grads
        to_x = grad * inside if ctx.needs_input_grad[0] else None
        to_scale = (grad * by_scale).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        return to_x, to_scale, None, None


def fake_quantize(
    x: Float[Tensor, "*rows n"], scale: Float[Tensor, "*rows 1"], zero: Float[Tensor, "*rows 1"], levels: int
) -> Float[Tensor, "*rows n"]:
    """Round `x` to the grid of `scale` and `zero` and return the rounded values, not the codes.

    Straight-through gradient: rounding counts as the identity, so `x` gets the gradient where its code is not
    clamped, and `scale` gets d/dscale of (code - zero) * scale. `zero` gets none, as in the originals.
    """
    return _RoundClamp.apply(x, scale, zero, levels - 1)


class _SymmetricTokens(torch.autograd.Function):
    """`fake_quantize_tokens` without a zero point; the scale's gradient goes to one element of the largest size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        top = 2 ** (bits - 1) - 1
        largest, at = x.abs().max(-1, keepdim=True)
        raw = largest / top
        scale = raw.clamp(SMALLEST_SCALE, LARGEST_SCALE)
        ratio = x / scale
        code = ratio.round()
        inside = (code >= -top - 1) & (code <= top)
        code.clamp_(-top - 1, top)
        if ctx.needs_input_grad[0]:
            sign = x.gather(-1, at).sign().mul_(raw == scale)
            ctx.save_for_backward(inside, code - ratio.mul_(inside), at, sign)
            ctx.top = top
        return code.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        inside, by_scale, at, sign = ctx.saved_tensors
        (grad,) = grads
        to_largest = (grad * by_scale).sum(-1, keepdim=True).mul_(sign).div_(ctx.top)
        return (grad * inside).scatter_add_(-1, at, to_largest), None


class _DynamicTokens(torch.autograd.Function):
    """`fake_quantize_tokens` in one piece; the range's gradient goes to one smallest and one largest element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        top = 2**bits - 1
        low, at_low = x.min(-1, keepdim=True)
        high, at_high = x.max(-1, keepdim=True)
        raw = (high - low) / top
        scale = raw.clamp(SMALLEST_SCALE, LARGEST_SCALE)
        zero = (-low / scale).round_()
        ratio = x / scale
        code = ratio.round().add_(zero)
        inside = (code >= 0) & (code <= top)
        code.clamp_(0, top).sub_(zero)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(inside, code - ratio.mul_(inside), at_low, at_high, raw == scale)
            ctx.top = top
        return code.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        inside, by_scale, at_low, at_high, free = ctx.saved_tensors
        (grad,) = grads
        to_scale = (grad * by_scale).sum(-1, keepdim=True).mul_(free).div_(ctx.top)
        to_x = grad * inside
        to_x.scatter_add_(-1, at_high, to_scale).scatter_add_(-1, at_low, to_scale.neg())
        return to_x, None


def fake_quantize_tokens(x: Float[Tensor, "*rows n"], bits: int, symmetric: bool = False) -> Float[Tensor, "*rows n"]:
    """Round each last-dimension vector of `x` on its own min-max grid (dynamic, per token).

    Asymmetric, or without a zero point: the step is max|x| / (2^(b-1) - 1) then, as int8 kernels that serve such models
    have it. (The package compressed-tensors takes max|x| / (2^(b-1) - 1/2), where the largest number lies halfway
    between two codes.)

    Computed in float32 whatever `x` is, returned in `x`'s dtype. 16 bits return `x` itself.
    """
    if bits >= 16:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    rule = _SymmetricTokens if symmetric else _DynamicTokens
    return rule.apply(wide, bits).to(x.dtype)


def grouped(w: Shaped[Tensor, "out in"], columns: int) -> Shaped[Tensor, "out g c"]:
    """Rows cut into groups of `columns`; a short last group is filled up with zeros, which no range notices."""
    short = -w.shape[1] % columns
    return (F.pad(w, (0, short)) if short else w).unflatten(1, (-1, columns))


def ungrouped(w: Shaped[Tensor, "out g c"], columns: int) -> Shaped[Tensor, "out in"]:
    """Undo `grouped`; `columns` is the length of the whole row."""
    return w.flatten(1)[:, :columns]


def weight_range(
    groups: Float[Tensor, "out g c"],
    lower: Float[Tensor, "out g"] | None = None,
    upper: Float[Tensor, "out g"] | None = None,
) -> tuple[Float[Tensor, "out g 1"], Float[Tensor, "out g 1"]]:
    """Smallest and largest weight of each group, both scaled by sigmoid of the clipping logits where given.

    Zero is always in the range, so that the zero point is a code itself and can be stored in as many bits
    (the originals let it leave the range). OmniQuant eq. 2 (learnable weight clipping).
    """
    # min and max give the gradient to one element, amin and amax would share it among equals at twice the cost.
    low = groups.min(-1, keepdim=True).values.clamp(max=0)
    high = groups.max(-1, keepdim=True).values.clamp(min=0)
    if lower is not None and upper is not None:
        low, high = low * lower.sigmoid().unsqueeze(-1), high * upper.sigmoid().unsqueeze(-1)
    return low, high


def symmetric_grid(levels: int) -> tuple[int, int]:
    """The code that stands for zero, and the steps from there to each end of the range, without a zero point.

    An even number of levels has one more below zero than above, which the range leaves out.
    """
    return levels // 2, (levels - 1) // 2


def scale_and_zero(
    low: Float[Tensor, "*rows 1"], high: Float[Tensor, "*rows 1"], levels: int, symmetric: bool
) -> tuple[Float[Tensor, "*rows 1"], Float[Tensor, "*rows 1"]]:
    """Step size and zero point (a code) of the range `low` .. `high`, which holds zero.

    Symmetric: the zero point is the middle code, so that b bits stand for -2^(b-1) .. 2^(b-1) - 1 and the step is
    max(|low|, |high|) / (2^(b-1) - 1), the form that serving formats store; five levels stand for -2 .. 2 (ABQ-LLM's
    bit balance), three for -1 .. 1.
    """
    if symmetric:
        middle, steps = symmetric_grid(levels)
        scale = torch.maximum(-low, high) / steps
        scale = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE)
        return scale, torch.full_like(scale, middle)
    top = levels - 1
    scale = ((high - low) / top).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return scale, zero_point(low, scale, top)


def zero_point(low: Tensor, scale: Tensor, top: int) -> Tensor:
    """The code that stands for zero; rounding has no gradient, so none is kept."""
    return (-low.detach() / scale.detach()).round_().clamp_(0, top)


def encode(
    w: Float[Tensor, "out in"],
    low: Float[Tensor, "out g 1"],
    high: Float[Tensor, "out g 1"],
    levels: int,
    columns: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "out g"], UInt8[Tensor, "out g"] | None]:
    """Codes, float16 scales and zero points (None if symmetric) of weights `w` on the given ranges.

    Codes are those on the grid that is stored, so that what is stored is exactly what `dequantize` gives back.
    """
    scale, zero = stored_grid(low, high, levels, symmetric, scale_dtype)
    codes = (grouped(w, columns) / scale).round_().add_(zero).clamp_(0, levels - 1)
    codes = ungrouped(codes, w.shape[1]).to(torch.uint8)
    return codes, scale.half().squeeze(-1), None if symmetric else zero.squeeze(-1).to(torch.uint8)


def stored_grid(
    low: Float[Tensor, "*rows 1"],
    high: Float[Tensor, "*rows 1"],
    levels: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Float[Tensor, "*rows 1"], Float[Tensor, "*rows 1"]]:
    """Step size and zero point as they are stored: the step is a number of float16, in the dtype of `low`.

    It is rounded first, and the zero point computed from the rounded one. With `scale_dtype` bfloat16 it is a number
    that bfloat16 holds, too.
    """
    scale, zero = scale_and_zero(low, high, levels, symmetric)
    scale = scale.to(scale_dtype).half().to(low.dtype)
    return scale, zero if symmetric else zero_point(low, scale, levels - 1)


def dequantize(
    codes: UInt8[Tensor, "out in"],
    scale: Float[Tensor, "out g"],
    zero: UInt8[Tensor, "out g"] | None,
    levels: int,
    columns: int,
) -> Float[Tensor, "out in"]:
    """The float32 weights that codes, scales and zero points stand for; `zero` None means the middle code."""
    middle: Tensor | int = symmetric_grid(levels)[0] if zero is None else zero.unsqueeze(-1).float()
    groups = (grouped(codes, columns).float() - middle) * scale.float().unsqueeze(-1)
    return ungrouped(groups, codes.shape[1])

"""Rounding activations on each token's own grid in one kernel, and its gradient in another.

Operators of torch's library, so that torch.compile takes each for one step and looks no further. The backward
pass computes the grid again from the input, the only thing kept. All arithmetic is float32, in the order of
`affine.fake_quantize_tokens`.
"""

# Tiles are [R tokens, C features]; a token wider than C is walked through in steps of C.

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ptql.functional import affine
from ptql.kernels import available
from ptql.kernels.available import blocks, constant, constexpr, jit, power_of_two, tl

SMALLEST_SCALE = constant(affine.SMALLEST_SCALE)
LARGEST_SCALE = constant(affine.LARGEST_SCALE)
WHOLE = constant(2.0**23)  # from here on float32 holds whole numbers only
NOWHERE = constant(2**31 - 1)  # no feature
WIDEST = 1024  # features of a tile


def round_tokens(
    x: Float[Tensor, "*rows n"], bits: int, dtype: torch.dtype, symmetric: bool = False
) -> Float[Tensor, "*rows n"]:
    """`x` with each last-dimension vector rounded on its own min-max grid, as `affine.fake_quantize_tokens`, in `dtype`.

    A view with permuted leading dimensions is read where it lies; result and gradient are laid out like it.
    16 bits only change the dtype.
    """
    if bits >= 16:
        return x.to(dtype)
    if not available.on_gpu(x):
        return round_tokens_reference(x, bits, dtype, symmetric)
    return torch.ops.ptql.round_tokens(x, bits, dtype, symmetric)


def round_tokens_reference(
    x: Float[Tensor, "*rows n"], bits: int, dtype: torch.dtype, symmetric: bool = False
) -> Float[Tensor, "*rows n"]:
    """`round_tokens` from the functions of `affine`, on any device; float64 stays float64 until the end."""
    wide = x if x.dtype == torch.float64 else x.float()
    return affine.fake_quantize_tokens(wide, bits, symmetric).to(dtype)


@jit
def _between(x, smallest, largest):
    x = tl.maximum(x, smallest, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, largest, propagate_nan=tl.PropagateNan.ALL)


@jit
def _nearest(x):
    """Halves to even, at any size: a token far from zero has large codes."""
    away = tl.where(x < 0, -WHOLE, WHOLE)
    return tl.where(tl.abs(x) < WHOLE, (x + away) - away, x)


@jit
def _token(pid, count, size1, size2, stride0, stride1, stride2, R: constexpr):
    """Which tokens exist, and where each of R begins."""
    token = pid.to(tl.int64) * R + tl.arange(0, R)[:, None]
    outer = token // size2
    at = (outer // size1) * stride0 + (outer % size1) * stride1 + (token % size2) * stride2
    return token < count, at


@jit
def _grid(low, high, top: constexpr, symmetric: constexpr, cuda: constexpr):
    """Scale, zero point and whether the scale is the range's own; the zero point is the middle code if symmetric."""
    steps: constexpr = top // 2 if symmetric else top
    if symmetric:
        high = tl.maximum(-low, high)
        low = tl.zeros_like(high)
    # On the GPU torch divides by a number as it multiplies by the inverse.
    raw = (high - low) * (1.0 / steps) if cuda else tl.math.div_rn(high - low, 1.0 * steps)
    scale = _between(raw, SMALLEST_SCALE, LARGEST_SCALE)
    zero = tl.zeros_like(scale) + (top + 1) // 2 if symmetric else _nearest(tl.math.div_rn(-low, scale))
    return scale, zero, raw == scale


@jit
def _round_kernel(
    x, out, count, n, size1, size2, x0, x1, x2, out0, out1, out2,
    top: constexpr, symmetric: constexpr, cuda: constexpr, R: constexpr, C: constexpr,
):  # fmt: skip
    exists, x_at = _token(tl.program_id(0), count, size1, size2, x0, x1, x2, R)
    _, out_at = _token(tl.program_id(0), count, size1, size2, out0, out1, out2, R)
    lane = tl.arange(0, C)[None, :]
    low = tl.full([R, C], float("inf"), tl.float32)
    high = tl.full([R, C], float("-inf"), tl.float32)
    for start in range(0, n, C):
        mask = exists & (start + lane < n)
        value = tl.load(x + x_at + start + lane, mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(start + lane < n, value, float("inf")))
        high = tl.maximum(high, tl.where(start + lane < n, value, float("-inf")))
    low, high = tl.min(low, axis=1, keep_dims=True), tl.max(high, axis=1, keep_dims=True)
    scale, zero, _ = _grid(low, high, top, symmetric, cuda)
    for start in range(0, n, C):
        mask = exists & (start + lane < n)
        value = tl.load(x + x_at + start + lane, mask=mask, other=0.0).to(tl.float32)
        code = _nearest(tl.math.div_rn(value, scale)) + zero
        rounded = (_between(code, 0.0, 1.0 * top) - zero) * scale
        tl.store(out + out_at + start + lane, rounded.to(out.dtype.element_ty), mask=mask)


@jit
def _gradient_kernel(
    grad, x, to_x, count, n, size1, size2, grad0, grad1, grad2, x0, x1, x2, to_x0, to_x1, to_x2,
    top: constexpr, symmetric: constexpr, cuda: constexpr, R: constexpr, C: constexpr,
):  # fmt: skip
    exists, grad_at = _token(tl.program_id(0), count, size1, size2, grad0, grad1, grad2, R)
    _, x_at = _token(tl.program_id(0), count, size1, size2, x0, x1, x2, R)
    _, to_x_at = _token(tl.program_id(0), count, size1, size2, to_x0, to_x1, to_x2, R)
    lane = tl.arange(0, C)[None, :]
    low = tl.full([R, C], float("inf"), tl.float32)
    high = tl.full([R, C], float("-inf"), tl.float32)
    at_low = tl.full([R, C], NOWHERE, tl.int32)
    at_high = tl.full([R, C], NOWHERE, tl.int32)
    for start in range(0, n, C):
        mask = exists & (start + lane < n)
        value = tl.load(x + x_at + start + lane, mask=mask, other=0.0).to(tl.float32)
        lower, higher = (start + lane < n) & (value < low), (start + lane < n) & (value > high)
        low, at_low = tl.where(lower, value, low), tl.where(lower, start + lane, at_low)
        high, at_high = tl.where(higher, value, high), tl.where(higher, start + lane, at_high)
    lowest, highest = tl.min(low, axis=1, keep_dims=True), tl.max(high, axis=1, keep_dims=True)
    at_low = tl.min(tl.where(low == lowest, at_low, NOWHERE), axis=1, keep_dims=True)
    at_high = tl.min(tl.where(high == highest, at_high, NOWHERE), axis=1, keep_dims=True)
    scale, zero, free = _grid(lowest, highest, top, symmetric, cuda)
    by_scale = tl.zeros([R, C], tl.float32)
    for start in range(0, n, C):
        mask = exists & (start + lane < n)
        value = tl.load(x + x_at + start + lane, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + grad_at + start + lane, mask=mask, other=0.0).to(tl.float32)
        ratio = tl.math.div_rn(value, scale)
        code = _nearest(ratio) + zero
        kept = (code >= 0) & (code <= top)
        by_scale += g * (_between(code, 0.0, 1.0 * top) - zero - tl.where(kept, ratio, 0.0))
    to_ends = tl.where(free, tl.sum(by_scale, axis=1, keep_dims=True) / (top // 2 if symmetric else top), 0.0)
    to_high, to_low = to_ends, -to_ends
    if symmetric:  # one element has the largest size; of two, the first
        at_top = (highest > -lowest) | ((highest == -lowest) & (at_high < at_low))
        to_high, to_low = tl.where(at_top, to_ends, 0.0), tl.where(at_top, 0.0, -to_ends)
    for start in range(0, n, C):
        mask = exists & (start + lane < n)
        value = tl.load(x + x_at + start + lane, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + grad_at + start + lane, mask=mask, other=0.0).to(tl.float32)
        code = _nearest(tl.math.div_rn(value, scale)) + zero
        g = tl.where((code >= 0) & (code <= top), g, 0.0)
        g += tl.where(start + lane == at_high, to_high, 0.0) + tl.where(start + lane == at_low, to_low, 0.0)
        tl.store(to_x + to_x_at + start + lane, g.to(to_x.dtype.element_ty), mask=mask)


def _readable(x: Tensor) -> Tensor:
    """`x` if the kernels can read it where it lies, else a contiguous copy."""
    dense = x.is_contiguous() or (x.dim() <= 4 and x.stride(-1) == 1)
    return x if dense else x.contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """The sizes of the three dimensions before the last; contiguous tensors are one list of tokens."""
    if x.dim() > 4:
        return 1, 1, x.numel() // x.shape[-1]
    first, second, third = (1, 1, 1, *x.shape[:-1])[-3:]
    return first, second, third


def _strides(x: Tensor) -> tuple[int, int, int]:
    """The strides that go with `_sizes`."""
    if x.dim() > 4:
        return 0, 0, x.shape[-1]
    first, second, third = (0, 0, 0, *x.stride()[:-1])[-3:]
    return first, second, third


def _launch(kernel: Any, bits: int, symmetric: bool, result: Tensor, *inputs: Tensor) -> None:
    n = result.shape[-1]
    count = result.numel() // max(n, 1)
    tensors = (*inputs, result)
    tile = {"C": min(power_of_two(n), WIDEST)}
    tile["R"] = min(2 * WIDEST // tile["C"], power_of_two(count))
    strides = [stride for tensor in tensors for stride in _strides(tensor)]
    if count and n:
        with torch.cuda.device_of(result):
            kernel[(blocks(count, tile["R"]),)](
                *tensors, count, n, *_sizes(result)[1:], *strides,
                top=2**bits - 1, symmetric=symmetric, cuda=result.is_cuda, **tile, enable_fp_fusion=False,
            )  # fmt: skip


@torch.library.custom_op(
    "ptql::round_tokens", mutates_args=(), schema="(Tensor x, int bits, ScalarType dtype, bool symmetric) -> Tensor"
)
def _round_tokens(x: Tensor, bits: int, dtype: torch.dtype, symmetric: bool) -> Tensor:
    x = _readable(x)
    out = torch.empty_like(x, dtype=dtype)
    _launch(_round_kernel, bits, symmetric, out, x)
    return out


@torch.library.custom_op(
    "ptql::round_tokens_backward", mutates_args=(), schema="(Tensor grad, Tensor x, int bits, bool symmetric) -> Tensor"
)
def _round_tokens_backward(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    x = _readable(x)
    to_x = torch.empty_like(x)
    _launch(_gradient_kernel, bits, symmetric, to_x, _readable(grad), x)
    return to_x


@_round_tokens.register_fake
def _(x: Tensor, bits: int, dtype: torch.dtype, symmetric: bool) -> Tensor:
    return torch.empty_like(_readable(x), dtype=dtype)


@_round_tokens_backward.register_fake
def _(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    return torch.empty_like(_readable(x))


def _keep(ctx: Any, inputs: tuple[Tensor, int, torch.dtype, bool], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.bits, ctx.symmetric = inputs[1], inputs[3]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.ptql.round_tokens_backward(grad, ctx.saved_tensors[0], ctx.bits, ctx.symmetric), None, None, None


_round_tokens.register_autograd(_gradient, setup_context=_keep)

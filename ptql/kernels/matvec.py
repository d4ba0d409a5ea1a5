"""A frozen matrix times a float32 vector: no float32 copy of the matrix, no TF32, sums in a fixed order."""

# axes: out, in = weight rows, columns. Tiles are [R rows, C columns].

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptql.kernels import available
from ptql.kernels.available import blocks, constexpr, jit, power_of_two, tl

WIDEST = 1024  # columns of a tile
PROGRAMS = 1024  # enough to fill a GPU several times over


def matvec(base: Float[Tensor, "out in"], vector: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
    """`base @ vector`, both taken as float32; `base` is frozen and contiguous, `vector` may be learnable."""
    if not available.on_gpu(base):
        return matvec_reference(base, vector)
    if not base.is_contiguous():
        raise ValueError(f"base has strides {base.stride()}: the kernel reads whole rows, give a contiguous weight")
    return _Matvec.apply(base, vector.float().contiguous())


def matvec_reference(base: Float[Tensor, "out in"], vector: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
    """`matvec` as a product and a sum, on any device; in float64 if `base` is."""
    return ((base if base.dtype == torch.float64 else base.float()) * vector).sum(1)


@jit
def _forward_kernel(base, vector, out, height, width, R: constexpr, C: constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    lane = tl.arange(0, C)[None, :]
    total = tl.zeros([R, C], tl.float32)
    for start in range(0, width, C):
        column = start + lane
        mask = (row < height) & (column < width)
        w = tl.load(base + row.to(tl.int64) * width + column, mask=mask, other=0.0).to(tl.float32)
        total += w * tl.load(vector + column, mask=column < width, other=0.0)
    tl.store(out + row, tl.sum(total, axis=1, keep_dims=True), mask=row < height)


@jit
def _backward_kernel(base, grad, partial, height, width, stripe, R: constexpr, C: constexpr):
    """The sum over a stripe of rows of `grad * base`."""
    column = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    first = tl.program_id(1) * stripe
    total = tl.zeros([R, C], tl.float32)
    for start in range(0, stripe, R):
        row = first + start + tl.arange(0, R)[:, None]
        mask = (row < height) & (column < width)
        w = tl.load(base + row.to(tl.int64) * width + column, mask=mask, other=0.0).to(tl.float32)
        total += w * tl.load(grad + row, mask=row < height, other=0.0)
    at = tl.program_id(1).to(tl.int64) * width + column
    tl.store(partial + at, tl.sum(total, axis=0, keep_dims=True), mask=column < width)


class _Matvec(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, vector: Tensor) -> Tensor:
        ctx.save_for_backward(base)
        height, width = base.shape
        out = vector.new_empty(height)
        c = min(power_of_two(width), WIDEST)
        r = 2 * WIDEST // c
        with torch.cuda.device_of(base):
            _forward_kernel[(blocks(height, r),)](base, vector, out, height, width, R=r, C=c)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (base,) = ctx.saved_tensors
        height, width = base.shape
        c = min(power_of_two(width), WIDEST)
        r = 2 * WIDEST // c
        across = blocks(width, c)
        # Stripes of sixteen rows or more, lest the partial sums be as large as the matrix.
        stripes = max(min(PROGRAMS // across, height // 16), 1)
        stripe = blocks(blocks(height, stripes), r) * r
        partial = grads[0].new_empty((blocks(height, stripe), width))
        with torch.cuda.device_of(base):
            _backward_kernel[(across, partial.shape[0])](
                base, grads[0].contiguous(), partial, height, width, stripe, R=r, C=c
            )
        return None, partial.sum(0)

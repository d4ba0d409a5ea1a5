"""Folding smoothing factors into a frozen weight and rounding it, in one pass over memory each way.

`fold_and_round` does in one to three kernels what `fold_and_round_reference` does in some forty, and keeps of a
weight only two numbers per group for the backward pass.
"""

# axes: out, in = weight rows, columns; g = groups of columns that share a scale

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptql.functional import affine
from ptql.functional.scaled import Scaled
from ptql.kernels import available, weight_kernels
from ptql.kernels.available import blocks, power_of_two

WIDEST = 1024  # columns of a tile
PROGRAMS = 1024  # enough to fill a GPU several times over


def fold_and_round(
    base: Float[Tensor, "out in"],
    rows: Float[Tensor, " out"] | None,
    columns: Float[Tensor, " in"] | None,
    lower: Float[Tensor, "out g"] | None,
    upper: Float[Tensor, "out g"] | None,
    *,
    levels: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    out: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """Values that the codes of `base * rows[:, None] * columns` stand for, rounded on each group's own range.

    Args:
        base: Frozen weight, contiguous; gets no gradient.
        rows: Factor of each row, learnable, or None.
        columns: Factor of each column, learnable, or None.
        lower: Clipping logits below zero (see `affine.weight_range`), with `upper`, or both None.
        upper: Clipping logits above zero.
        levels: Of the grid.
        group: Columns that share a scale; the last group of a row may be shorter.
        symmetric: Zero is the middle code.
        dtype: Of the result.
        out: Where to write the result, contiguous; it may be rows of a larger buffer. Counts as changed in
            place, so what was saved of its buffer for a backward pass is no longer good for one.
    """
    if (lower is None) != (upper is None):
        raise ValueError("one of the clipping logits is None: give both `lower` and `upper`, or neither")
    if out is not None and (out.dtype != dtype or not out.is_contiguous()):
        raise ValueError(f"out is {out.dtype} with strides {out.stride()}: it must be contiguous and of {dtype}")
    if not available.on_gpu(base):
        return fold_and_round_reference(
            base, rows, columns, lower, upper, levels=levels, group=group, symmetric=symmetric, dtype=dtype, out=out
        )
    if not base.is_contiguous():
        raise ValueError(f"base has strides {base.stride()}: the kernel reads whole rows, give a contiguous weight")
    learnt = [None if t is None else t.float().contiguous() for t in (rows, columns, lower, upper)]
    # Detached, `out` is no view to autograd, which else would send the gradient through the whole buffer.
    result = torch.empty_like(base, dtype=dtype) if out is None else out.detach()
    return _FoldAndRound.apply(base, *learnt, result, _Groups(group, levels, symmetric))


def fold_and_round_reference(
    base: Float[Tensor, "out in"],
    rows: Float[Tensor, " out"] | None,
    columns: Float[Tensor, " in"] | None,
    lower: Float[Tensor, "out g"] | None,
    upper: Float[Tensor, "out g"] | None,
    *,
    levels: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    out: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """`fold_and_round` from the functions of `affine`; on any device, in float64 if `base` is."""
    w = Scaled(base, rows, columns).dense()
    groups = affine.grouped(w, group)
    scale, zero = affine.scale_and_zero(*affine.weight_range(groups, lower, upper), levels, symmetric)
    result = affine.ungrouped(affine.fake_quantize(groups, scale, zero, levels), w.shape[1]).to(dtype)
    return result if out is None else out.detach().copy_(result)


class _Groups(NamedTuple):
    """How a weight's columns are rounded."""

    group: int
    levels: int
    symmetric: bool

    def tile(self, width: int, elements: int) -> dict[str, int]:
        """Rows, groups and columns of a tile of so many elements: wide enough to read memory in long pieces."""
        c = min(power_of_two(self.group), WIDEST)
        g = min(power_of_two(blocks(width, self.group)), WIDEST // c)
        return {"R": max(elements // (c * g), 1), "G": g, "C": c}


class _FoldAndRound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        lower: Tensor | None,
        upper: Tensor | None,
        out: Tensor,
        plan: _Groups,
    ) -> Tensor:
        height, width = base.shape
        groups = blocks(width, plan.group)
        scales = base.new_empty((height, groups), dtype=torch.float32)
        zeros = torch.empty_like(scales)
        tile = plan.tile(width, 2048)
        grid = (blocks(height, tile["R"]) * blocks(groups, tile["G"]),)
        with torch.cuda.device_of(base):
            weight_kernels.round_groups[grid](
                base, rows, columns, lower, upper, out, scales, zeros, height, width, plan.group, groups,
                levels=plan.levels, symmetric=plan.symmetric, cuda=base.is_cuda, **tile, enable_fp_fusion=False,
            )  # fmt: skip
        ctx.save_for_backward(base, rows, columns, lower, upper, scales, zeros)
        ctx.plan = plan
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        base, rows, columns, lower, upper, scales, zeros = ctx.saved_tensors
        _, want_rows, want_columns, want_lower, want_upper, *_ = ctx.needs_input_grad
        grad = grads[0].contiguous()
        plan: _Groups = ctx.plan
        height, width = base.shape
        groups = scales.shape[1]

        def per_group(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty_like(scales, dtype=dtype) if wanted else None

        to_rows, to_lower, to_upper = per_group(want_rows), per_group(want_lower), per_group(want_upper)
        ends = [per_group(want_columns, dtype) for dtype in (torch.float32, torch.float32, torch.int32, torch.int32)]
        tile = plan.tile(width, 1024)
        grid = (blocks(height, tile["R"]) * blocks(groups, tile["G"]),)
        with torch.cuda.device_of(base):
            weight_kernels.range_gradients[grid](
                grad, base, rows, columns, lower, upper, scales, zeros, to_rows, to_lower, to_upper, *ends,
                height, width, plan.group, groups,
                levels=plan.levels, symmetric=plan.symmetric, cuda=base.is_cuda, fold=want_rows or want_columns,
                **tile, enable_fp_fusion=False,
            )  # fmt: skip
            to_columns = _to_columns(grad, base, rows, columns, scales, zeros, ends, plan) if want_columns else None
        return None, None if to_rows is None else to_rows.sum(1), to_columns, to_lower, to_upper, None, None


def _to_columns(
    grad: Tensor,
    base: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    ends: list[Tensor | None],
    plan: _Groups,
) -> Tensor:
    """Gradient of the columns' factors: sums over stripes of rows, then over the stripes."""
    height, width = base.shape
    groups = scales.shape[1]
    tile = plan.tile(width, 2048)
    across = blocks(groups, tile["G"]) * blocks(plan.group, tile["C"])
    # Stripes of sixteen rows or more, lest the partial sums be as large as the weight.
    stripes = max(min(PROGRAMS // across, height // 16), 1)
    stripe = blocks(blocks(height, stripes), tile["R"]) * tile["R"]
    partial = base.new_empty((blocks(height, stripe), width), dtype=torch.float32)
    weight_kernels.column_gradients[(across, partial.shape[0])](
        grad, base, rows, columns, scales, zeros, *ends, partial, height, width, plan.group, groups, stripe,
        levels=plan.levels, **tile, enable_fp_fusion=False,
    )  # fmt: skip
    return partial.sum(0)

"""GPTQ: rounds columns one by one, and lets those that are still to come make up for what each one lost.

Source: Frantar et al., GPTQ (ICLR 2023), section 3 and algorithm 1. Groups are static: their grids are those of the
weights as they were, so that what is stored is what `affine.encode` stores, in whatever order columns are rounded.
"""

# axes: out, in = weight rows, columns; g = groups of columns that share a scale; n = tokens

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ptql.functional import affine
from ptql.functional.float32_products import float32_products

BLOCK = 128  # columns whose errors reach those behind them in one matrix product; it decides on speed alone
TRIES = 6  # of a damping, each ten times the one before: after them it is far above what float32 can get wrong
SMALLEST_STEP = 1e-12  # of a grid that a learned factor shrinks to nothing


def add_products(total: Float[Tensor, "in in"], x: Float[Tensor, "n in"]) -> None:
    """Add x^T x to `total`, in place."""
    with float32_products():
        total.addmm_(x.t(), x)


def inverse_factor(
    moments: Float[Tensor, "in in"], damping: float, raised: Callable[[float | None], None] | None = None
) -> Float[Tensor, "in in"]:
    """Upper triangular U with U^T U the inverse of `moments`, of which the diagonal's mean is 1, plus `damping` on it.

    Where that is not positive definite in the given dtype, the damping is raised tenfold, up to five times. What has
    no factor then holds no finite numbers, or nothing but zeros: the identity is given, which feeds nothing back, so
    that all columns are rounded to nearest. In both cases `raised` is called, with the damping that was enough or None.

    It is found from the other end: with its rows and columns reversed, the matrix is L L^T, and U is the inverse of L,
    reversed. So the inverse itself, which has the square of the condition, is never made.
    """
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    level = moments.diagonal().mean()
    for attempt in range(TRIES if level.isfinite() else 0):
        damped = moments.flip(0, 1).div_(level)
        damped.diagonal().add_(damping * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if factor.isfinite().all():
                if attempt and raised is not None:
                    raised(damping * 10**attempt)
                return factor
    if raised is not None:
        raised(None)
    return identity


def encode(
    w: Float[Tensor, "out in"],
    moments: Float[Tensor, "in in"],
    low: Float[Tensor, "out g 1"],
    high: Float[Tensor, "out g 1"],
    levels: int,
    columns: int | Int[Tensor, " in"],
    symmetric: bool,
    damping: float = 0.01,
    act_order: bool = False,
    gain: Float[Tensor, "out in"] | None = None,
    scale_dtype: torch.dtype = torch.float16,
    raised: Callable[[float | None], None] | None = None,
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "out g"], UInt8[Tensor, "out g"] | None]:
    """Codes, float16 scales and zero points as of `affine.encode`; codes keep products with inputs near those of `w`.

    A column that saw zeros alone has no product; it is rounded to nearest (the original makes it zero).

    Args:
        w: Weights.
        moments: Second moments of the inputs, to any factor.
        low: Lower end of each group's range.
        high: Upper end.
        levels: Values of a code.
        columns: Of a full group of neighbours; or the number of each column's group, wherever its columns are.
        symmetric: No zero points.
        damping: What is added to the diagonal of the moments, in parts of its mean.
        act_order: Begin with the columns that have the largest inputs, while most others are there to make up for them.
        gain: What multiplies the decoded weights afterwards, element by element.
        scale_dtype: As of `affine.stored_grid`.
        raised: As of `inverse_factor`.
    """
    scale, zero = affine.stored_grid(low, high, levels, symmetric, scale_dtype)
    order = torch.arange(w.shape[1], device=w.device)
    if act_order:
        order = moments.diagonal().argsort(descending=True, stable=True)
        moments = moments[order][:, order]
    groups = order // columns if isinstance(columns, int) else columns[order]
    rounded = torch.empty(w.shape[::-1], dtype=torch.uint8, device=w.device)
    rounded[order] = _fed_back(
        w.t()[order].contiguous(),
        inverse_factor(moments, damping, raised).to(w.dtype),
        groups.tolist(),
        scale.squeeze(-1).t().contiguous(),
        zero.squeeze(-1).t().contiguous(),
        levels - 1,
        None if gain is None else gain.t()[order],
    )
    codes = rounded.t().contiguous()
    return codes, scale.half().squeeze(-1), None if symmetric else zero.squeeze(-1).to(torch.uint8)


def _fed_back(
    left: Float[Tensor, "in out"],
    factor: Float[Tensor, "in in"],
    groups: list[int],
    scale: Float[Tensor, "g out"],
    zero: Float[Tensor, "g out"],
    top: int,
    gain: Float[Tensor, "in out"] | None,
) -> UInt8[Tensor, "in out"]:
    """Codes of a matrix whose columns are given as rows, one contiguous piece each; `left` is used up."""
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            step, middle = scale[groups[i]], zero[groups[i]]
            if gain is not None:
                step = step * gain[i]
                step = torch.where(step.abs() < SMALLEST_STEP, SMALLEST_STEP, step)
            code = (left[i] / step).round_().add_(middle).clamp_(0, top)
            codes[i] = code
            error = errors[i - start] = (left[i] - code.sub_(middle).mul_(step)) / factor[i, i]
            left[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        with float32_products():
            left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return codes

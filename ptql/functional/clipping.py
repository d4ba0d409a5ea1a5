"""Clipping found by search: the share of each group's range on which rounding loses least."""

# axes: out, in = weight rows, columns; g = groups of columns that share a scale; c = columns of a group

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ptql.functional import affine

SHARES = tuple(round(0.10 + 0.04 * k, 2) for k in range(23))  # to 0.98, where OmniQuant's clipping begins; rising


def best_share(
    groups: Float[Tensor, "out g c"],
    levels: int,
    symmetric: bool,
    importance: Float[Tensor, "1 g c"] | None = None,
    shares: Sequence[float] = SHARES,
) -> Float[Tensor, "out g"]:
    """The one of `shares` that rounds each group with the least squared error; the largest of equals.

    It is the same above and below zero. The whole range is far from the best at 2 and 3 bits, where a few large
    weights decide how coarse the grid is for all others.

    Args:
        groups: Weights; zeros that fill up a short last group add no error.
        levels: Of the grid.
        symmetric: The grid has no zero point.
        importance: Weight of each column's squared error, such as the mean square of what it is multiplied with.
        shares: Of the range, in rising order.
    """
    low, high = affine.weight_range(groups)
    best = low.new_full(groups.shape[:2], shares[-1])
    least = torch.full_like(best, torch.inf)
    for share in reversed(shares):
        scale, zero = affine.scale_and_zero(low * share, high * share, levels, symmetric)
        error = (affine.fake_quantize(groups, scale, zero, levels) - groups).square_()
        error = (error if importance is None else error.mul_(importance)).sum(-1)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return best


def round_clipped(
    w: Float[Tensor, "out in"], importance: Float[Tensor, " in"], levels: int, columns: int, symmetric: bool
) -> Float[Tensor, "out in"]:
    """Weights rounded on the best share of each group's range: what learned clipping comes to, without learning.

    With the mean squares of the inputs as importance, what is least is the error of the product, inputs taken as
    uncorrelated.
    """
    groups = affine.grouped(w, columns)
    weights = affine.grouped(importance[None], columns)
    share = best_share(groups, levels, symmetric, weights, (*SHARES, 1.0)).unsqueeze(-1)
    low, high = affine.weight_range(groups)
    scale, zero = affine.scale_and_zero(low * share, high * share, levels, symmetric)
    return affine.ungrouped(affine.fake_quantize(groups, scale, zero, levels), w.shape[1])

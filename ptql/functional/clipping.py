"""Clipping found by search: the share of each group's range on which rounding loses least."""

# axes: out, in = weight rows, columns; g = groups of columns that share a scale; c = columns of a group

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ptql.functional import affine

SHARES = tuple(round(0.10 + 0.04 * k, 2) for k in range(23))  # to 0.98, where OmniQuant's clipping begins; rising


def best_share(groups: Float[Tensor, "out g c"], levels: int, symmetric: bool) -> Float[Tensor, "out g"]:
    """The one of `SHARES` that rounds each group with the least squared error; the largest of equals.

    It is the same above and below zero. The whole range is far from the best at 2 and 3 bits, where a few large
    weights decide how coarse the grid is for all others.

    Args:
        groups: Weights; zeros that fill up a short last group add no error.
        levels: Of the grid.
        symmetric: The grid has no zero point.
    """
    low, high = affine.weight_range(groups)
    best = low.new_full(groups.shape[:2], SHARES[-1])
    least = torch.full_like(best, torch.inf)
    for share in reversed(SHARES):
        scale, zero = affine.scale_and_zero(low * share, high * share, levels, symmetric)
        error = (affine.fake_quantize(groups, scale, zero, levels) - groups).square_().sum(-1)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return best

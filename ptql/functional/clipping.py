"""Clipping found by search: the share of each group's range on which rounding loses least."""

# axes: out, in = weight rows, columns; g = groups of columns that share a scale; c = columns of a group

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ptql.functional import affine, cluster_scales

SHARES = tuple(round(0.10 + 0.04 * k, 2) for k in range(23))  # to 0.98, where OmniQuant's clipping begins; rising


def best_share(
    groups: Float[Tensor, "out g c"], levels: int, symmetric: bool, importance: Float[Tensor, "g c"] | None = None
) -> Float[Tensor, "out g"]:
    """The one of `SHARES` that rounds each group with the least squared error; the largest of equals.

    It is the same above and below zero. The whole range is far from the best at 2 and 3 bits, where a few large
    weights decide how coarse the grid is for all others.

    Args:
        groups: Weights; zeros that fill up a short last group add no error.
        levels: Of the grid.
        symmetric: The grid has no zero point.
        importance: What the squared error of each column counts; all alike by default.
    """

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        lost = (affine.fake_quantize(groups, scale, zero, levels) - groups).square_()
        return lost.sum(-1) if importance is None else (lost * importance).sum(-1)

    return _of_least_error(*affine.weight_range(groups), levels, symmetric, error)


def best_share_of_clusters(
    w: Float[Tensor, "out in"],
    cluster: Int[Tensor, " in"],
    clusters: int,
    levels: int,
    symmetric: bool,
    importance: Float[Tensor, " in"] | None = None,
) -> Float[Tensor, "out {clusters}"]:
    """`best_share` of each cluster of the columns of `w`; `cluster` has the number of each column's."""

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        lost = (cluster_scales.fake_quantize(w, scale, zero, cluster, levels) - w).square_()
        return cluster_scales.cluster_sums(lost if importance is None else lost * importance, cluster, clusters)

    return _of_least_error(*cluster_scales.weight_range(w, cluster, clusters), levels, symmetric, error)


def _of_least_error(
    low: Float[Tensor, "out g 1"],
    high: Float[Tensor, "out g 1"],
    levels: int,
    symmetric: bool,
    error: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "out g"]:
    """`error` of a grid's scale and zero point is [out, g]."""
    best = low.new_full(low.shape[:2], SHARES[-1])
    least = torch.full_like(best, torch.inf)
    for share in reversed(SHARES):
        lost = error(*affine.scale_and_zero(low * share, high * share, levels, symmetric))
        best = torch.where(lost < least, share, best)
        least = torch.minimum(lost, least)
    return best

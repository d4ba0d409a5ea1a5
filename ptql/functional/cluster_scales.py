"""`ptql.functional.affine` where clusters of columns share a scale: any columns of a row, any number of them.

Source: RPTQ (arXiv 2304.01089), whose weights have a scale and a zero point for each output channel and each cluster of
input channels. Clusters are never filled up to one size: the largest holds nearly a whole row.
"""

# axes: out, in = weight rows, columns; g = clusters of columns that share a scale

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ptql.functional import affine
from ptql.functional.float32_products import float32_products


class _Spread(torch.autograd.Function):
    """`spread`, whose gradients are added up in the same order each time: by index, a GPU would not."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cluster: Tensor) -> Tensor:
        ctx.save_for_backward(cluster)
        ctx.clusters = values.shape[1]
        return values.squeeze(-1).index_select(1, cluster)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (cluster,) = ctx.saved_tensors
        return cluster_sums(grads[0], cluster, ctx.clusters).unsqueeze(-1), None


def spread(values: Float[Tensor, "out g 1"], cluster: Int[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """Of each column, the value of its cluster."""
    return _Spread.apply(values, cluster)


def cluster_sums(
    x: Float[Tensor, "out in"], cluster: Int[Tensor, " in"], clusters: int
) -> Float[Tensor, "out {clusters}"]:
    """Sum over the columns of each cluster, as a product with ones and zeros."""
    members = cluster[:, None] == torch.arange(clusters, device=x.device)
    with float32_products(), torch.autocast(x.device.type, enabled=False):
        return x @ members.to(x.dtype)


def weight_range(
    w: Float[Tensor, "out in"],
    cluster: Int[Tensor, " in"],
    clusters: int,
    lower: Float[Tensor, "out {clusters}"] | None = None,
    upper: Float[Tensor, "out {clusters}"] | None = None,
) -> tuple[Float[Tensor, "out {clusters} 1"], Float[Tensor, "out {clusters} 1"]]:
    """As `affine.weight_range`, zero included; both ends are zero where there are fewer clusters than `clusters`.

    The gradient of an end goes to the columns that reach it, in equal shares.

    Args:
        w: Weights.
        cluster: The number of each column's cluster.
        clusters: How many there are, at most.
        lower: Clipping logits.
        upper: Likewise.
    """
    index, zeros = cluster.expand(w.shape), w.new_zeros(len(w), clusters)
    low, high = (zeros.scatter_reduce(1, index, w, kind) for kind in ("amin", "amax"))
    if lower is not None and upper is not None:
        low, high = low * lower.sigmoid(), high * upper.sigmoid()
    return low.unsqueeze(-1), high.unsqueeze(-1)


def fake_quantize(
    w: Float[Tensor, "out in"],
    scale: Float[Tensor, "out g 1"],
    zero: Float[Tensor, "out g 1"],
    cluster: Int[Tensor, " in"],
    levels: int,
) -> Float[Tensor, "out in"]:
    """As `affine.fake_quantize`, with its gradients: each column on the grid of its cluster."""
    x, step, middle = (t.unsqueeze(-1) for t in (w, spread(scale, cluster), spread(zero, cluster)))
    return affine.fake_quantize(x, step, middle, levels).squeeze(-1)


def encode(
    w: Float[Tensor, "out in"],
    low: Float[Tensor, "out g 1"],
    high: Float[Tensor, "out g 1"],
    levels: int,
    cluster: Int[Tensor, " in"],
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "out g"], UInt8[Tensor, "out g"] | None]:
    """As `affine.encode`: codes, float16 scales and zero points (None if symmetric) on the grid that is stored."""
    scale, zero = affine.stored_grid(low, high, levels, symmetric, scale_dtype)
    codes = (w / spread(scale, cluster)).round_().add_(spread(zero, cluster)).clamp_(0, levels - 1).to(torch.uint8)
    return codes, scale.half().squeeze(-1), None if symmetric else zero.squeeze(-1).to(torch.uint8)


def dequantize(
    codes: UInt8[Tensor, "out in"],
    scale: Float[Tensor, "out g"],
    zero: UInt8[Tensor, "out g"] | None,
    levels: int,
    cluster: Int[Tensor, " in"],
) -> Float[Tensor, "out in"]:
    """The float32 weights that codes, scales and zero points stand for; `zero` None means the middle code."""
    middle: Tensor | int = affine.symmetric_grid(levels)[0]
    if zero is not None:
        middle = zero.float().index_select(1, cluster)
    return (codes.float() - middle) * scale.float().index_select(1, cluster)

"""PTQ1.61's weights: of the input channels with the largest inputs more bits, of all others the sign.

    w_hat[:, others] = (rows x columns) * (scale * sign(w - mean) + mean)

`mean` and the start of `scale` are the means of w and of |w| over the other channels of a row; `scale`, `rows` and
`columns` are learned, signs never change. Source: PTQ1.61 (ACL 2025), eq. 9, and its code, which has the `mean`.
"""

# axes: out, in = weight rows, columns; s = salient channels, n = all others

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def salient_channels(size: Float[Tensor, " in"], count: int) -> Bool[Tensor, " in"]:
    """The `count` channels of largest `size`; of equals, those that come first."""
    found = torch.zeros_like(size, dtype=torch.bool)
    found[size.argsort(descending=True, stable=True)[:count]] = True
    return found


def others_first_moments(
    w: Float[Tensor, "out in"], others: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "out 1"], Float[Tensor, "out 1"]]:
    """Mean of the weights, and of their magnitudes, over the channels `others` of each row."""
    rest = w[:, others]
    return rest.mean(1, keepdim=True), rest.abs().mean(1, keepdim=True)


def signs(w: Float[Tensor, "out in"], mean: Float[Tensor, "out 1"]) -> Float[Tensor, "out in"]:
    """1 where `w` is not below `mean`, else -1. (The original has 0 where they are equal, which no bit can store.)"""
    return torch.where(w >= mean, 1.0, -1.0).to(w.dtype)


class _Permuted(torch.autograd.Function):
    """Channels in another order, some of them more than once; back, each takes the gradient at one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(-1, place), None, None  # a gather; that of index_select would add, one by one


def permuted(x: Float[Tensor, "*b in"], order: Int[Tensor, " p"], place: Int[Tensor, " in"]) -> Float[Tensor, "*b p"]:
    """`x[..., order]`, where channel c stands at `place[c]`.

    Where `order` repeats a channel to fill up, what is made of it must be zero: no gradient comes from there.
    """
    return _Permuted.apply(x, order, place)


def channel_order(salient: Bool[Tensor, " in"], multiple: int) -> tuple[Tensor, Tensor, int]:
    """The order in which matrix products read channels: others first, then salient ones, each filled up to a multiple.

    Returns:
        `order` and `place` as `permuted` takes them, and how many of the first are others, filled up.
    """
    parts = [kind.nonzero().flatten() for kind in (salient.logical_not(), salient)]
    filled = [F.pad(part, (0, -len(part) % multiple)) for part in parts]
    place = torch.empty_like(salient, dtype=torch.int64)
    for part, start in zip(parts, (0, len(filled[0])), strict=True):
        place[part] = torch.arange(start, start + len(part), device=salient.device)
    return torch.cat(filled), place, len(filled[0])


def signed_product(
    x: Float[Tensor, "*b p"],
    sign: Float[Tensor, "out n"],
    gain: Float[Tensor, " out"],
    mean: Float[Tensor, " out"],
    columns: Float[Tensor, " n"],
    hats: Float[Tensor, "out s"],
) -> Float[Tensor, "*b out"]:
    """What the rounded matrix makes of `x`, of which the first n channels are others, the rest salient. Where channels
    fill up, `sign`, `columns` and `hats` are zero.

        gain * (sign (columns * x)_others) + mean * sum (columns * x)_others + hats x_salient

    The matrix is not written out, and gradients of its vectors take no product of the matrix's size. The original's
    code writes it out in each step.
    """
    others, salient = x.split([sign.shape[1], hats.shape[1]], -1)
    scaled = others * columns
    made = F.linear(scaled, sign.to(_product_dtype(scaled))) * gain + scaled.sum(-1, keepdim=True) * mean
    return made + F.linear(salient, hats.to(_product_dtype(salient))) if hats.shape[1] else made


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which a product with `x` is computed: autocast takes what it is given, other products want equal ones."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

"""PTQ1.61's weights: of the input channels with the largest inputs more bits, of all others the sign.

    w_hat[:, others] = (rows x columns) * (scale * sign(w - mean) + mean)

`mean` and the start of `scale` are the means of w and of |w| over the other channels of a row; `scale`, `rows` and
`columns` are learned, signs never change. Source: PTQ1.61 (ACL 2025), eq. 9, and its code, which has the `mean`.
"""

# axes: out, in = weight rows, columns; s = salient channels, n = all others

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int8
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


class _Binary(torch.autograd.Function):
    """`binary_into` with its gradients written out: signs are kept in a byte each, and nothing else of that size."""

    @staticmethod
    def forward(
        ctx: Any, sign: Tensor, channels: Tensor, hats: Tensor, gain: Tensor, mean: Tensor, columns: Tensor, place: Any
    ) -> Tensor:
        ctx.save_for_backward(sign, channels, gain, mean, columns)
        ctx.hats = hats.dtype
        out = place[0].copy_((sign * gain).add_(mean).mul_(columns))
        return out.index_copy_(1, channels, hats.to(out.dtype)).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sign, channels, gain, mean, columns = ctx.saved_tensors
        grad = grads[0].to(gain.dtype)
        of_hats = grad[:, channels].to(ctx.hats) if ctx.needs_input_grad[2] else None
        with_sign, others = grad * sign, columns.index_fill(1, channels, 0.0).flatten()
        # products with vectors, which no setting makes TF32
        by_gain, by_mean = with_sign.mv(others)[:, None], grad.mv(others)[:, None]
        by_columns = with_sign.T.mv(gain.flatten()).add_(grad.T.mv(mean.flatten()))[None]
        return None, None, of_hats, by_gain, by_mean, by_columns.index_fill(1, channels, 0.0), None


def binary_into(
    sign: Int8[Tensor, "out in"],
    channels: Int[Tensor, " s"],
    hats: Float[Tensor, "out s"],
    gain: Float[Tensor, "out 1"],
    mean: Float[Tensor, "out 1"],
    columns: Float[Tensor, "1 in"],
    out: Float[Tensor, "out in"],
) -> Float[Tensor, "out in"]:
    """Write (gain * sign + mean) * columns to `out`, and `hats` to the channels `channels`; in `out`'s dtype.

    Differentiable in `hats`, `gain`, `mean` and `columns`; the last has no gradient in `channels`.
    """
    return _Binary.apply(sign, channels, hats, gain, mean, columns, [out])

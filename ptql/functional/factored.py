"""A matrix times a factor of low rank, element by element: w[i, j] * sum over k of left[i, k] * right[k, j].

Source: the "rotation vectors" of LRQuant's journal version (LRQuant+), which multiply rounded weights.
"""

# axes: out, in = weight rows, columns; k = rank of the factor

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

LITTLE = 1e-2  # one step of the usual learning rate


def ones_of_rank(rows: int, columns: int, rank: int) -> tuple[Float[Tensor, "{rows} k"], Float[Tensor, "k {columns}"]]:
    """`left` and `right` whose product is 1 everywhere, for any rank (the original's is the rank).

    The first component is ones. Of the others `right` is zero, and `left` a little noise: equal components would get
    equal gradients for ever, and of two zeros neither would get any. The noise is the same for every matrix of a
    size, in every process, and whenever a run goes on, so it does not come from the run's random numbers.
    """
    left, right = torch.ones(rows, rank), torch.zeros(rank, columns)
    left[:, 1:] = LITTLE * torch.randn(rows, rank - 1, generator=torch.Generator().manual_seed(0))
    right[0] = 1
    return left, right


def factor(left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]) -> Float[Tensor, "out in"]:
    """The product of `left` and `right`, added up in the order of k.

    In the dtype of both, the same on every device: as a matrix product it would be in TF32, or in what autocast says.
    """
    total = left[:, :1] * right[:1]
    for k in range(1, left.shape[1]):
        total += left[:, k : k + 1] * right[k : k + 1]
    return total


class _Factored(torch.autograd.Function):
    """Keeps the matrix and the vectors for the way back, and nothing else of the matrix's size."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(w, left, right)
        return w * factor(left, right)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, left, right = ctx.saved_tensors
        (grad,) = grads
        by_factor = grad * w
        to_left = torch.stack([(by_factor * row).sum(1) for row in right], 1) if ctx.needs_input_grad[1] else None
        columns = left.unbind(1)
        to_right = torch.stack([(by_factor * c[:, None]).sum(0) for c in columns]) if ctx.needs_input_grad[2] else None
        return grad * factor(left, right) if ctx.needs_input_grad[0] else None, to_left, to_right


def factored(
    w: Float[Tensor, "out in"], left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]
) -> Float[Tensor, "out in"]:
    """`w` times the factor, element by element; differentiable in all three."""
    return _Factored.apply(w, left, right)

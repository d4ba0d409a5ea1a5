"""Differentiable writing to memory that is there already, so that nobody copies it once more."""

# axes: out, in = weight rows, columns

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Into(torch.autograd.Function):
    """Writes a tensor into prepared memory, in that memory's dtype; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, place: list[Tensor]) -> Tensor:
        ctx.dtype = source.dtype
        return place[0].copy_(source).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class _Stacked(torch.autograd.Function):
    """Matrices that lie below each other in one buffer, as one matrix."""

    @staticmethod
    def forward(ctx: Any, buffer: list[Tensor], *parts: Tensor) -> Tensor:
        ctx.rows = [len(part) for part in parts]
        return buffer[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads[0].split(ctx.rows)


def write_into(source: Tensor, place: Tensor) -> Tensor:
    """`source`, written to `place` and read from there; gradients pass."""
    return _Into.apply(source, [place])


def stacked(buffer: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """`buffer`, whose rows were written part by part, as one differentiable matrix."""
    return _Stacked.apply([buffer], *parts)

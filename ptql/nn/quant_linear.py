"""The stand-ins for `nn.Linear` and for a norm without bias while a block is calibrated or evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptql.nn.signed_product import SignedProduct

Rounding = Callable[[Tensor], Tensor]
"""Rounds activations along the last dimension: same shape, same dtype."""


class SharedRounding:
    """Rounds an input once for all linear layers that read it, called one after the other with the same tensor.

    Args:
        rounding: What rounds.
        readers: How many layers read the input; after so many calls nothing is held any more.
    """

    def __init__(self, rounding: Rounding, readers: int) -> None:
        self._rounding, self._readers = rounding, readers
        self._input: Tensor | None = None
        self._rounded: Tensor | None = None
        self._left = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self._input is not x or self._rounded is None:
            self._input, self._rounded, self._left = x, self._rounding(x), self._readers
        rounded = self._rounded
        self._left -= 1
        if self._left == 0:
            self._input = self._rounded = None
        return rounded

    def apart(self, x: Tensor) -> Tensor:
        """The same for one who only looks on, and is none of the readers."""
        return self._rounding(x)


class MergedProduct:
    """One matrix product for all linear layers that read the same input, called one after the other with it.

    While it is on, the first layer's weight (and bias) is given as those of all of them, one below the other.

    Args:
        readers: The layers, in the order in which they are called.
        rounding: Applied to the input, or None.
    """

    def __init__(self, readers: Sequence[QuantLinear], rounding: Rounding | None) -> None:
        self._first, self._rows = readers[0], [reader.out_features for reader in readers]
        self._rounding = rounding
        self.on = False
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._left = 0

    def part(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` makes of `x`."""
        if self._input is not x:
            rounded = x if self._rounding is None else self._rounding(x)
            self._parts = F.linear(rounded, self._first.weight, self._first.bias).split(self._rows, -1)
            self._input, self._left = x, len(self._rows)
        part = self._parts[index]
        self._left -= 1
        if self._left == 0:
            self._input, self._parts = None, ()
        return part


@contextmanager
def step_products(module: nn.Module) -> Iterator[None]:
    """While open, layers in `module` that share an input are one matrix product each group, or signed products."""
    linears = [linear for linear in module.modules() if isinstance(linear, QuantLinear)]
    products: list[MergedProduct | SignedProduct] = [linear.merged[0] for linear in linears if linear.merged]
    products += [linear.signed for linear in linears if linear.signed is not None]
    for product in products:
        product.on = True
    try:
        yield
    finally:
        for product in products:
            product.on = False


class QuantLinear(nn.Module):
    """A linear layer that rounds its input; its weight is whatever the caller put there (fake-quantised or not).

    Args:
        weight: [out, in].
        bias: [out], or None.
        rounding: Applied to the input, or None.
    """

    merged: tuple[MergedProduct, int] | None = None
    """The product that this layer can be a part of, and which part."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rounding: Rounding | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.rounding = rounding
        self.signed: SignedProduct | None = None
        """What can take the place of the product with `weight`."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def multiplied(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with where the input is `x`, for one who looks on."""
        if isinstance(self.rounding, SharedRounding):
            return self.rounding.apart(x)
        return x if self.rounding is None else self.rounding(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.signed is not None and self.signed.on:
            made = self.signed(x if self.rounding is None else self.rounding(x))
            return made if self.bias is None else made + self.bias
        if self.merged is not None and self.merged[0].on:
            return self.merged[0].part(self.merged[1], x)
        return F.linear(x if self.rounding is None else self.rounding(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rounding={self.rounding}"


class ShiftedNorm(nn.Module):
    """A norm followed by a bias: what a learned shift turns an RMSNorm into.

    Args:
        norm: The model's own norm, whose weight is `norm.weight`, of `hidden` entries.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight = norm.weight
        assert isinstance(weight, Tensor)
        self.norm = norm
        self.bias = nn.Parameter(torch.zeros_like(weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.bias


ORDER = "order"
"""The buffer of a norm that says which channel comes where, int32 [hidden]."""


def gather_inputs(norm: nn.Module) -> None:
    """Let `norm`, in place, read its input's channels in the order of a buffer, at first as they are.

    A norm's statistics do not depend on an order, so one whose weight and bias are in the same order gives its old
    output in that order, and what is folded into it still meets the columns that read it. It is a hook rather than
    a stand-in, as the names of weight and bias would change with one.
    """
    weight = next(norm.parameters())
    norm.register_buffer(ORDER, torch.arange(weight.shape[0], dtype=torch.int32, device=weight.device))
    norm.register_forward_pre_hook(_gather)


def _gather(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    order = norm.order
    assert isinstance(order, Tensor)
    return (args[0].index_select(-1, order), *args[1:])

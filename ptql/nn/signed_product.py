"""A matrix of signs and salient channels as a learning step multiplies with it: never written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptql.functional import binary

MULTIPLE = 64  # channels of either kind are filled up to: matrix products want even shapes


class ChannelOrder(nn.Module):
    """Puts the channels of an input in order once for all layers that read it, called one after the other with it.

    Args:
        salient: Which channels are salient, [in].
        readers: How many layers read the input; after so many calls nothing is held any more.
    """

    order: Tensor
    place: Tensor

    def __init__(self, salient: Tensor, readers: int) -> None:
        super().__init__()
        order, place, self.others = binary.channel_order(salient, MULTIPLE)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self._readers = readers
        self._input: Tensor | None = None
        self._ordered: Tensor | None = None
        self._left = 0

    def forward(self, x: Tensor) -> Tensor:
        if self._input is not x or self._ordered is None:
            self._input, self._ordered, self._left = x, binary.permuted(x, self.order, self.place), self._readers
        ordered = self._ordered
        self._left -= 1
        if self._left == 0:
            self._input = self._ordered = None
        return ordered


class SignedProduct(nn.Module):
    """Stands in for the product with a layer's matrix while it is `on`.

    What is not learned is made once, here; `gain`, `mean`, `columns` and, if they are learned, `hats` are given anew in
    each step.

    Args:
        order: Of the channels.
        sign: Of all weights, [out, in], 1 and -1.
        hats: Weights of the salient channels on their grid, [out, s].
        dtype: In which matrix products read signs and hats.
    """

    on = False
    sign: Tensor
    hats: Tensor
    gain: Tensor
    mean: Tensor
    columns: Tensor

    def __init__(self, order: ChannelOrder, sign: Tensor, hats: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.order = order
        out, count = sign.shape[0], order.others
        signs = sign.new_zeros(out, count, dtype=dtype)
        others = len(order.place) - hats.shape[1]
        signs[:, :others] = sign[:, order.order[:others]]  # channels that fill up have no sign
        self.register_buffer("sign", signs, persistent=False)
        self.register_buffer("hats", self.filled(hats).to(dtype), persistent=False)
        for name, size in (("gain", out), ("mean", out), ("columns", count)):
            self.register_buffer(name, torch.zeros(size, device=sign.device), persistent=False)

    def filled(self, hats: Tensor) -> Tensor:
        """Zeros for the channels that fill the salient ones up."""
        return nn.functional.pad(hats, (0, len(self.order.order) - self.order.others - hats.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return binary.signed_product(self.order(x), self.sign, self.gain, self.mean, self.columns, self.hats)

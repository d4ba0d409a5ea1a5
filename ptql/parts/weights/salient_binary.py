"""PTQ1.61: signs with learned gains, and more bits for the input channels that matter most."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptql.errors import InputError
from ptql.functional import affine, binary
from ptql.nn.salient_linear import dense_from_salient, salient_tensors
from ptql.nn.signed_product import ChannelOrder, SignedProduct
from ptql.parts import check_learning_rate
from ptql.parts.inputs import InputRange
from ptql.parts.weights.affine import USUAL, Affine
from ptql.parts.weights.base import LinearQuantizer, WeightQuantizer
from ptql.parts.weights.column_clusters import ColumnClusters
from ptql.recipe import IntScheme, LayerSchemes

Statistic = Literal["max", "mean"]


class SalientBinary(WeightQuantizer):
    """Weights of the format `salient`: 1 bit, and more in a share of the input channels. Layers that the recipe gives
    another format are rounded as `Affine` does, with clipping if anything is learned.

    Args:
        statistic: What makes a channel salient: the largest magnitude of its inputs, or their mean magnitude. The
            original's paper says `mean`, its code does `max`.
        learn: Learn scales of the signs and factors of rows and columns; else they stay at their closed-form start.
        faithful: Codes of salient channels have the range of the whole row, as in the original; else that of the
            salient channels alone, of which a share is learned (if anything is).
        lr: Learning rate of the signs' scales. Also recorded: 9e-5 for Llama 2 and OPT.
        factor_lr: Of the factors of rows and columns. Also recorded: 9e-3 for Llama 2 and OPT.
        clip_lr: Of the shares of the range, where `faithful` is off.
    """

    takes_transforms = False
    chooses_channels = True

    def __init__(
        self,
        statistic: Statistic = "max",
        learn: bool = True,
        faithful: bool = True,
        lr: float = 5e-4,
        factor_lr: float = 1e-3,
        clip_lr: float = 1e-2,
    ) -> None:
        if statistic not in get_args(Statistic):
            raise InputError(f"statistic={statistic!r}: one of {', '.join(get_args(Statistic))} is needed")
        for rate in (lr, factor_lr, clip_lr):
            check_learning_rate(rate, "take `learn: false` to learn nothing")
        self.statistic: Statistic = statistic
        self.learn = learn
        self.faithful = faithful
        self.lr = lr
        self.factor_lr = factor_lr
        self.clip_lr = clip_lr

    def check(self, schemes: LayerSchemes) -> None:
        if schemes.default.quantised and schemes.default.salient is None:
            raise InputError(
                f"weight: bits={schemes.default.bits} with SalientBinary, which is for signs and salient channels; "
                "use weight: {bits: 1, salient: 0.2}, or the weight quantiser Affine"
            )

    def for_linear(
        self,
        name: str,
        weight: Tensor,
        scheme: IntScheme,
        inputs: InputRange | None = None,
        clusters: ColumnClusters | None = None,
    ) -> LinearQuantizer:
        if scheme.salient is None:
            return Affine(clip=self.learn).for_linear(name, weight, scheme)
        assert inputs is not None, f"{name}: nothing is known of its inputs"
        size = inputs.absmax if self.statistic == "max" else inputs.mean
        salient = binary.salient_channels(size.float(), scheme.salient_columns(weight.shape[1]))
        rates = {"scale": self.lr, "rows": self.factor_lr, "columns": self.factor_lr}
        if not self.faithful and salient.any():
            rates |= dict.fromkeys(("lower", "upper"), self.clip_lr)
        return SalientBinaryLinear(weight.float(), scheme, salient, rates if self.learn else {}, self.faithful)


class SalientBinaryLinear(LinearQuantizer):
    """Quantiser of a [out, in] matrix whose channels `salient` [in] have more bits.

    `scale` [out, 1] and `rows` [out, 1] multiply a row's signs (one of them would do; the original learns both), `rows`
    its mean, too; `columns` [1, in] both, where a channel is not salient. `lower` and `upper` [out, 1] are clipping
    logits of the salient channels' range, where there are any.
    """

    def __init__(self, w: Tensor, scheme: IntScheme, salient: Tensor, rates: dict[str, float], whole_row: bool) -> None:
        super().__init__()
        self.scheme, self.row, self.whole_row = scheme, w.shape[1], whole_row
        self._rates = rates
        channels, others = salient.nonzero().flatten(), salient.logical_not().nonzero().flatten()
        mean, scale = binary.others_first_moments(w, others)
        constants = {"salient": salient, "channels": channels, "others": others, "mean": mean}
        start = {"scale": scale, "rows": torch.ones_like(mean), "columns": w.new_ones(1, w.shape[1])}
        if not whole_row and channels.numel():
            start |= {name: torch.full_like(mean, USUAL) for name in ("lower", "upper")}
        for name, value in start.items():
            setattr(self, name, nn.Parameter(value, requires_grad=name in rates))
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)  # they follow from the source and its inputs

    scale: nn.Parameter
    rows: nn.Parameter
    columns: nn.Parameter
    lower: nn.Parameter
    upper: nn.Parameter
    salient: Tensor
    channels: Tensor
    others: Tensor
    mean: Tensor

    def rate(self, name: str) -> float:
        return self._rates[name]

    def set_rate(self, lr: float) -> None:
        self._rates = dict.fromkeys(self._rates, lr)

    def fake(self, w: Tensor) -> Tensor:
        rounded = (self._gain * binary.signs(w, self.mean) + self._mean) * self.columns
        return rounded.index_copy(1, self.channels, self._hats(w))

    def product(self, w: Tensor, order: ChannelOrder, dtype: torch.dtype) -> SignedProduct:
        """The product with the rounded matrix, where nothing folds `w`; `dtype` is that of matrix products."""
        return SignedProduct(order, binary.signs(w, self.mean), self._hats(w), dtype)

    def factors(self, w: Tensor, product: SignedProduct) -> dict[str, Tensor]:
        """What `product` is given in a step, by name; differentiable."""
        columns = F.pad(self.columns[0, self.others], (0, product.order.others - self.others.numel()))
        found = {"gain": self._gain[:, 0], "mean": self._mean[:, 0], "columns": columns}
        if not self.whole_row and self.channels.numel():
            found["hats"] = product.filled(self._hats(w)).to(product.hats.dtype)
        return found

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        positive = (w[:, self.others] >= self.mean).to(torch.uint8)
        signs = positive, self._gain, self._mean, self.columns[:, self.others]
        if not self.channels.numel():
            return salient_tensors(*signs)
        few, bits = self.channels.numel(), self.scheme.salient_bits
        codes, scale, zero = affine.encode(w[:, self.channels], *self._range(w), 2**bits, few, symmetric=False)
        assert zero is not None
        return salient_tensors(*signs, self.salient, (codes, scale, zero), bits)

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        return dense_from_salient(stored, self.row, self.scheme)

    @property
    def _gain(self) -> Tensor:
        return self.rows * self.scale

    @property
    def _mean(self) -> Tensor:
        return self.rows * self.mean

    def _hats(self, w: Tensor) -> Tensor:
        """Salient channels [out, s] of a matrix of any dtype on their grid, in float32 at least."""
        wide = torch.promote_types(w.dtype, torch.float32)
        if not self.channels.numel():
            return w[:, :0].to(wide)
        levels = 2**self.scheme.salient_bits
        low, high = self._range(w)
        scale, zero = affine.scale_and_zero(low.to(wide), high.to(wide), levels, symmetric=False)
        return affine.fake_quantize(w[:, self.channels].to(wide).unsqueeze(1), scale, zero, levels).squeeze(1)

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.whole_row:
            return affine.weight_range(w.unsqueeze(1))
        return affine.weight_range(w[:, self.channels].unsqueeze(1), self.lower, self.upper)

"""Min-max rounding of weights, with learnable clipping (OmniQuant's LWC) if wanted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptql.errors import check_number
from ptql.functional import affine
from ptql.functional.scaled import Scaled
from ptql.kernels.weights import fold_and_round
from ptql.nn.packed_linear import dense_from_packed, packed_tensors
from ptql.parts import check_learning_rate
from ptql.parts.weights.base import LinearQuantizer, WeightQuantizer
from ptql.recipe import IntScheme

MOST = 100  # far beyond where a sigmoid in float32 is 0 or 1, and nothing moves it


class Affine(WeightQuantizer):
    """Uniform codes per channel or group; the range is that of the weights times a learned share.

    Args:
        clip: Learn a share of the range, separately above and below zero, for each group.
        initial: Logit to start from: sigmoid(4) = 0.982 of the range (OmniQuant).
        lr: Learning rate of the logits.
    """

    def __init__(self, clip: bool = True, initial: float = 4.0, lr: float = 1e-2) -> None:
        check_learning_rate(lr, "take `clip: false` to learn no clipping")
        check_number("initial", initial, -MOST, MOST, f"a logit lies between -{MOST} and {MOST}; 4.0 is usual")
        self.clip = clip
        self.initial = initial
        self.lr = lr

    def for_linear(self, name: str, weight: Tensor, scheme: IntScheme) -> LinearQuantizer:
        return AffineLinear(weight.shape[0], weight.shape[1], scheme, self.initial if self.clip else None, self.lr)


class AffineLinear(LinearQuantizer):
    """Affine quantiser of a [out, in] matrix; `lower` and `upper` are clipping logits, [out, groups]."""

    def __init__(self, rows: int, row: int, scheme: IntScheme, initial: float | None, lr: float) -> None:
        super().__init__()
        self.scheme = scheme
        self.row = row
        self.lr = lr
        self.lower = self.upper = None
        if initial is not None:
            self.lower = nn.Parameter(torch.full((rows, scheme.groups(row)), initial))
            self.upper = nn.Parameter(torch.full((rows, scheme.groups(row)), initial))

    def fake(self, w: Tensor) -> Tensor:
        s = self.scheme
        groups = affine.grouped(w, s.columns(self.row))
        scale, zero = affine.scale_and_zero(*self._range(groups), s.bits, s.symmetric)
        return affine.ungrouped(affine.fake_quantize(groups, scale, zero, s.bits), self.row)

    def fake_into(self, w: Scaled, out: Tensor) -> Tensor:
        s = self.scheme
        return fold_and_round(
            w.base,
            w.rows,
            w.columns,
            self.lower,
            self.upper,
            bits=s.bits,
            group=s.columns(self.row),
            symmetric=s.symmetric,
            dtype=out.dtype,
            out=out,
        )

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        s = self.scheme
        low, high = self._range(affine.grouped(w, s.columns(self.row)))
        codes, scale, zero = affine.encode(w, low, high, s.bits, s.columns(self.row), s.symmetric)
        return packed_tensors(codes, scale, zero, s.bits)

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        return dense_from_packed(stored, self.row, self.scheme)

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        return affine.weight_range(groups, self.lower, self.upper)

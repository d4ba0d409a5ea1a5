"""Min-max rounding of weights, with learnable clipping (OmniQuant's LWC) and factors (LRQuant+) if wanted."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ptql.errors import InputError, check_number
from ptql.functional import affine
from ptql.functional.buffers import write_into
from ptql.functional.clipping import best_share
from ptql.functional.factored import factored, ones_of_rank
from ptql.functional.scaled import Scaled
from ptql.kernels.weights import fold_and_round
from ptql.nn.packed_linear import dense_from_packed, packed_tensors
from ptql.parts import check_learning_rate
from ptql.parts.inputs import InputRange
from ptql.parts.weights.base import LinearQuantizer, WeightQuantizer
from ptql.recipe import IntScheme

MOST = 100  # far beyond where a sigmoid in float32 is 0 or 1, and nothing moves it
USUAL = 4.0
HIGHEST_RANK = 64  # float16 factors of a matrix of 4096 x 4096 take half a bit of each weight then


class Affine(WeightQuantizer):
    """Uniform codes per channel or group; the range is that of the weights times a learned share.

    Args:
        clip: Learn a share of the range, separately above and below zero, for each group.
        initial: Logit to start from: sigmoid(4) = 0.982 of the range (OmniQuant). Or `search`: the share that rounds
            each group with the least squared error (ours; for 3 bits and fewer, whose best share is far from there).
        lr: Learning rate of the logits and of the factors.
        factor_rank: Learn a factor of this rank for each matrix, which multiplies the rounded weights element by
            element and is stored in float16 (LRQuant+, whose rank is 1); 0 for none.
    """

    def __init__(
        self, clip: bool = True, initial: float | Literal["search"] = USUAL, lr: float = 1e-2, factor_rank: int = 0
    ) -> None:
        check_learning_rate(lr, "take `clip: false` to learn no clipping")
        if initial == "search" and not clip:
            raise InputError(
                "initial=search with clip=false: without clipping nothing begins anywhere; use clip: true, and "
                "--trainer.max_epochs 0 to learn nothing"
            )
        if initial != "search":
            rule = f"a logit lies between -{MOST} and {MOST}; 4.0 is usual, `search` looks for the best"
            check_number("initial", initial, -MOST, MOST, rule)
        if type(factor_rank) is not int or not 0 <= factor_rank <= HIGHEST_RANK:
            raise InputError(
                f"factor_rank={factor_rank}: the rank of a factor is a whole number from 0 to {HIGHEST_RANK}; take 1, "
                "or 0 for none"
            )
        self.clip = clip
        self.initial: float | Literal["search"] = initial
        self.lr = lr
        self.factor_rank = factor_rank

    @property
    def begins_on_weights(self) -> bool:  # type: ignore[override]
        return self.clip and self.initial == "search"

    def for_linear(
        self, name: str, weight: Tensor, scheme: IntScheme, inputs: InputRange | None = None
    ) -> LinearQuantizer:
        return AffineLinear(weight.shape[0], weight.shape[1], scheme, self.first_logit, self.lr, self.factor_rank)

    @property
    def first_logit(self) -> float | None:
        """What clipping begins with, before any search; None without it."""
        return None if not self.clip else USUAL if self.initial == "search" else self.initial


class AffineLinear(LinearQuantizer):
    """Affine quantiser of a [out, in] matrix.

    `lower` and `upper` are clipping logits, [out, groups]. The product of `left` [out, k] and `right` [k, in]
    multiplies rounded weights; ranges, codes and scales are those of the weights without it.
    """

    def __init__(
        self, rows: int, row: int, scheme: IntScheme, initial: float | None, lr: float, factor_rank: int = 0
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.row = row
        self.lr = lr
        self.lower = self.upper = None
        if initial is not None:
            self.lower = nn.Parameter(torch.full((rows, scheme.groups(row)), initial))
            self.upper = nn.Parameter(torch.full((rows, scheme.groups(row)), initial))
        self.left = self.right = None
        if factor_rank:
            self.left, self.right = map(nn.Parameter, ones_of_rank(rows, row, factor_rank))

    @torch.no_grad()
    def begin_on(self, w: Tensor) -> None:
        s = self.scheme
        assert self.lower is not None
        assert self.upper is not None
        logits = best_share(affine.grouped(w, s.columns(self.row)), s.levels, s.symmetric).logit()
        self.lower.copy_(logits)
        self.upper.copy_(logits)

    def fake(self, w: Tensor) -> Tensor:
        s = self.scheme
        groups = affine.grouped(w, s.columns(self.row))
        scale, zero = affine.scale_and_zero(*self._range(groups), s.levels, s.symmetric)
        rounded = affine.ungrouped(affine.fake_quantize(groups, scale, zero, s.levels), self.row)
        return self._factored(rounded)

    def fake_into(self, w: Scaled, out: Tensor) -> Tensor:
        if self.left is None:
            return self._rounded(w, out.dtype, out)
        return write_into(self._factored(self._rounded(w, torch.promote_types(out.dtype, torch.float32))), out)

    def _rounded(self, w: Scaled, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        s = self.scheme
        return fold_and_round(
            w.base,
            w.rows,
            w.columns,
            self.lower,
            self.upper,
            levels=s.levels,
            group=s.columns(self.row),
            symmetric=s.symmetric,
            dtype=dtype,
            out=out,
        )

    def _factored(self, rounded: Tensor) -> Tensor:
        return rounded if self.left is None or self.right is None else factored(rounded, self.left, self.right)

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        s = self.scheme
        low, high = self._range(affine.grouped(w, s.columns(self.row)))
        kind = getattr(torch, s.scale_dtype)
        codes, scale, zero = affine.encode(w, low, high, s.levels, s.columns(self.row), s.symmetric, kind)
        factors = None if self.left is None or self.right is None else (self.left, self.right)
        return packed_tensors(codes, scale, zero, s.levels, factors)

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        return dense_from_packed(stored, self.row, self.scheme)

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        return affine.weight_range(groups, self.lower, self.upper)

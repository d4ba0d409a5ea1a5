"""The affine quantiser of one matrix: what it learns, how it rounds, what is stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptql.functional import affine
from ptql.functional.buffers import write_into
from ptql.functional.clipping import best_share
from ptql.functional.factored import factored, ones_of_rank
from ptql.functional.scaled import Scaled
from ptql.kernels.weights import fold_and_round
from ptql.nn.packed_linear import dense_from_packed, packed_tensors
from ptql.parts.inputs import InputRange
from ptql.parts.weights.base import LinearQuantizer
from ptql.recipe import IntScheme


class AffineLinear(LinearQuantizer):
    """Affine quantiser of a [out, in] matrix.

    `lower` and `upper` are clipping logits, [out, groups]. The product of `left` [out, k] and `right` [k, in]
    multiplies rounded weights; ranges, codes and scales are those of the weights without it.
    """

    def __init__(
        self,
        rows: int,
        row: int,
        scheme: IntScheme,
        initial: float | None,
        lr: float,
        factor_rank: int = 0,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.row = row
        self.lr = lr
        self.lower = self.upper = None
        if initial is not None:
            groups = scheme.groups(row) if groups is None else groups
            self.lower = nn.Parameter(torch.full((rows, groups), initial))
            self.upper = nn.Parameter(torch.full((rows, groups), initial))
        self.left = self.right = None
        if factor_rank:
            self.left, self.right = map(nn.Parameter, ones_of_rank(rows, row, factor_rank))

    @torch.no_grad()
    def begin_on(self, w: Tensor, inputs: InputRange | None = None) -> None:
        assert self.lower is not None
        assert self.upper is not None
        logits = self.share_of_least_error(w, None if inputs is None else inputs.mean.square()).logit()
        self.lower.copy_(logits)
        self.upper.copy_(logits)

    def fake(self, w: Tensor) -> Tensor:
        return self._factored(self.rounded(w))

    def fake_into(self, w: Scaled, out: Tensor) -> Tensor:
        if self.left is None:
            return self._folded_and_rounded(w, out.dtype, out)
        made = self._folded_and_rounded(w, torch.promote_types(out.dtype, torch.float32))
        return write_into(self._factored(made), out)

    def _folded_and_rounded(self, w: Scaled, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
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

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.left is None or self.right is None else (self.left, self.right)

    # What depends on which columns share a scale

    @property
    def grouping(self) -> int | Tensor:
        """Columns of a full group of neighbours, or the number of each column's group [in]."""
        return self.scheme.columns(self.row)

    def share_of_least_error(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """The share of each group's range that rounds it best, [out, groups]; `importance` of each column, [in]."""
        s, columns = self.scheme, self.scheme.columns(self.row)
        counts = None if importance is None else affine.grouped(importance[None], columns)[0]
        return best_share(affine.grouped(w, columns), s.levels, s.symmetric, counts)

    def clipped_range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends of each group's range after clipping, [out, groups, 1]."""
        return affine.weight_range(affine.grouped(w, self.scheme.columns(self.row)), self.lower, self.upper)

    def rounded(self, w: Tensor) -> Tensor:
        """Rounded weights [out, in] without factors; differentiable."""
        s = self.scheme
        groups = affine.grouped(w, s.columns(self.row))
        ends = affine.weight_range(groups, self.lower, self.upper)
        scale, zero = affine.scale_and_zero(*ends, s.levels, s.symmetric)
        return affine.ungrouped(affine.fake_quantize(groups, scale, zero, s.levels), self.row)

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        s, kind = self.scheme, getattr(torch, self.scheme.scale_dtype)
        return self.packed(*affine.encode(w, *self.clipped_range(w), s.levels, s.columns(self.row), s.symmetric, kind))

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        """What is stored for codes [out, in], scales and zero points [out, groups]."""
        return packed_tensors(codes, scale, zero, self.scheme.levels, self.factors)

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        return dense_from_packed(stored, self.row, self.scheme)

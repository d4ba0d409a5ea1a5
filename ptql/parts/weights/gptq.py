"""GPTQ (ICLR 2023): codes that make up for each other's errors on the inputs that were seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptql.errors import check_number
from ptql.functional import gptq
from ptql.functional.factored import factor
from ptql.nn.packed_linear import stored_half
from ptql.parts.inputs import InputRange
from ptql.parts.weights.affine import USUAL, Affine, Search
from ptql.parts.weights.affine_linear import AffineLinear
from ptql.parts.weights.base import LinearQuantizer
from ptql.parts.weights.clustered_affine import ClusteredAffineLinear
from ptql.parts.weights.column_clusters import ColumnClusters
from ptql.recipe import IntScheme

LEAST_DAMPING, MOST_DAMPING = 1e-6, 1.0


class Gptq(Affine):
    """Grids as those of `Affine`, learned in the same way if anything is learned; codes by GPTQ once that is done.

    While learning, weights are rounded to nearest. At a block's end its matrices are encoded in order of execution,
    each on the inputs that the ones before it, encoded, lead to: a pass of the block for every input. What is stored
    is as with `Affine`.

    Args:
        clip: Learn a share of the range, separately above and below zero, for each group.
        initial: As of `Affine`: a logit, `search_on_inputs` or `search`.
        lr: Learning rate of the logits and of the factors.
        factor_rank: Learn a factor of this rank for each matrix, as in `Affine`; 0 for none.
        damping: Added to the diagonal of the inputs' second moments, in parts of its mean (the original's percdamp).
        act_order: Round the columns with the largest inputs first (off in the original, if nothing is said). Scales
            stay those of neighbouring columns, or of clusters, so that nothing else is stored and loaded models are no
            slower.
    """

    wants_moments = True

    def __init__(
        self,
        clip: bool = True,
        initial: float | Search = USUAL,
        lr: float = 1e-2,
        factor_rank: int = 0,
        damping: float = 0.01,
        act_order: bool = True,
    ) -> None:
        super().__init__(clip, initial, lr, factor_rank)
        rule = f"a part of the diagonal's mean from {LEAST_DAMPING:g} to {MOST_DAMPING:g}; 0.01 is usual"
        check_number("damping", damping, LEAST_DAMPING, MOST_DAMPING, rule)
        self.damping = damping
        self.act_order = act_order

    def for_linear(
        self,
        name: str,
        weight: Tensor,
        scheme: IntScheme,
        inputs: InputRange | None = None,
        clusters: ColumnClusters | None = None,
    ) -> LinearQuantizer:
        rows, row = weight.shape
        given = rows, row, scheme, self.first_logit, self.lr, self.factor_rank
        own: dict[str, Any] = {"damping": self.damping, "act_order": self.act_order}
        return GptqLinear(*given, **own) if clusters is None else ClusteredGptqLinear(*given, clusters=clusters, **own)


class GptqLinear(AffineLinear):
    """`AffineLinear` of a [out, in] matrix, with another choice of codes where second moments of inputs are known."""

    def __init__(self, *given: Any, damping: float, act_order: bool, **named: Any) -> None:
        super().__init__(*given, **named)
        self.damping = damping
        self.act_order = act_order

    def encode_on(self, w: Tensor, moments: Tensor) -> dict[str, Tensor]:
        s, gain, self.remark = self.scheme, None, None
        if self.factors is not None:
            gain = factor(*(stored_half(part).view(torch.float16).float() for part in self.factors))
        found = gptq.encode(
            w,
            moments,
            *self.clipped_range(w),
            s.levels,
            self.grouping,
            s.symmetric,
            damping=self.damping,
            act_order=self.act_order,
            gain=gain,
            scale_dtype=getattr(torch, s.scale_dtype),
            raised=self._note,
        )
        return self.packed(*found)

    def _note(self, enough: float | None) -> None:
        """Remember that the moments are not positive definite with the damping that was asked for."""
        if enough is None:
            self.remark = "rounded to nearest: the moments of its inputs hold zeros alone, or no finite numbers"
        else:
            self.remark = f"GPTQ with a damping of {enough:g} instead of {self.damping:g}: its inputs hardly differ"


class ClusteredGptqLinear(ClusteredAffineLinear, GptqLinear):
    """Grids of clusters from the one, the choice of codes from the other."""

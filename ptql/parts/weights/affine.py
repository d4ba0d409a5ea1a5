"""Min-max rounding of weights, with learnable clipping (OmniQuant's LWC) and factors (LRQuant+) if wanted."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ptql.errors import InputError, check_number
from ptql.parts import check_learning_rate
from ptql.parts.inputs import InputRange
from ptql.parts.weights.affine_linear import AffineLinear
from ptql.parts.weights.base import LinearQuantizer, WeightQuantizer
from ptql.parts.weights.clustered_affine import ClusteredAffineLinear
from ptql.parts.weights.column_clusters import ColumnClusters
from ptql.recipe import IntScheme

MOST = 100  # far beyond where a sigmoid in float32 is 0 or 1, and nothing moves it
USUAL = 4.0
Search = Literal["search", "search_on_inputs"]
HIGHEST_RANK = 64  # float16 factors of a matrix of 4096 x 4096 take half a bit of each weight then


class Affine(WeightQuantizer):
    """Uniform codes per channel, group or cluster; the range is that of the weights times a learned share.

    Args:
        clip: Learn a share of the range, separately above and below zero, for each group.
        initial: Logit to start from: sigmoid(4) = 0.982 of the range (OmniQuant). Or a share that is looked for, group
            by group (ours; for 3 bits and fewer, whose best share is far from there): `search_on_inputs`, the one with
            the least squared error, a column's counting by the square of its inputs' mean magnitude; `search`, where
            all columns count alike.
        lr: Learning rate of the logits and of the factors.
        factor_rank: Learn a factor of this rank for each matrix, which multiplies the rounded weights element by
            element and is stored in float16 (LRQuant+, whose rank is 1); 0 for none.
    """

    takes_clusters = True

    def __init__(
        self, clip: bool = True, initial: float | Search = USUAL, lr: float = 1e-2, factor_rank: int = 0
    ) -> None:
        check_learning_rate(lr, "take `clip: false` to learn no clipping")
        if initial in get_args(Search) and not clip:
            raise InputError(
                f"initial={initial} with clip=false: without clipping nothing begins anywhere; use clip: true, and "
                "--trainer.max_epochs 0 to learn nothing"
            )
        if initial not in get_args(Search):
            rule = f"a logit lies between -{MOST} and {MOST}; 4.0 is usual, `search_on_inputs` looks for the best"
            check_number("initial", initial, -MOST, MOST, rule)
        if type(factor_rank) is not int or not 0 <= factor_rank <= HIGHEST_RANK:
            raise InputError(
                f"factor_rank={factor_rank}: the rank of a factor is a whole number from 0 to {HIGHEST_RANK}; take 1, "
                "or 0 for none"
            )
        self.clip = clip
        self.initial: float | Search = initial
        self.lr = lr
        self.factor_rank = factor_rank

    @property
    def begins_on_weights(self) -> bool:  # type: ignore[override]
        return self.clip and self.initial in get_args(Search)

    @property
    def begins_on_inputs(self) -> bool:  # type: ignore[override]
        return self.clip and self.initial == "search_on_inputs"

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
        return AffineLinear(*given) if clusters is None else ClusteredAffineLinear(*given, clusters=clusters)

    @property
    def first_logit(self) -> float | None:
        """What clipping begins with, before any search; None without it."""
        if not self.clip:
            return None
        return USUAL if isinstance(self.initial, str) else self.initial

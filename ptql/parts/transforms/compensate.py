"""ABQ-LLM's distribution correction: a learned matrix of low rank, added to a weight before it is rounded."""

# axes: out, in = weight rows, columns; r = rank

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptql.errors import InputError
from ptql.functional.factored import factor
from ptql.functional.scaled import multiplied_out
from ptql.parts import check_learning_rate
from ptql.parts.transforms.base import BlockFacts, Transform, TransformState, Weights

MOST = 64


class Compensate(Transform):
    """Adds `left @ right` to the last matrix of the MLP in the outer blocks, which lose the most by rounding.

    It is no equivalence: what is learned there undoes what rounding does to the block. It goes into the codes, so it
    costs nothing afterwards.

    Args:
        rank: Of what is added.
        first: Blocks at the beginning that have it.
        last: Blocks at the end that have it.
        lr: Learning rate of both factors.
    """

    def __init__(self, rank: int = 1, first: int = 3, last: int = 4, lr: float = 1e-2) -> None:
        check_learning_rate(lr, "leave Compensate out of the transforms to add nothing")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MOST:
            raise InputError(f"rank={rank}: what is added has a rank of 1 to {MOST}; 1 is usual")
        for name, count in (("first", first), ("last", last)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise InputError(f"{name}={count}: a number of blocks is 0 or more; leave it out for the usual one")
        self.rank, self.first, self.last, self.lr = rank, first, last, lr

    def for_block(self, facts: BlockFacts) -> TransformState:
        outer = facts.index < self.first or facts.index >= facts.total - self.last
        return CompensateBlock(facts.layout.last, facts.weights, self.rank if outer else 0, self.lr)


class CompensateBlock(TransformState):
    """`left` [out, r] begins at zero, so nothing is added at first; `right` [r, in] at ones, then signs at random.

    Rows of `right` that were alike would stay alike. The signs come from a generator of their own: a run's random
    numbers are not touched, and a block that goes on begins the same.

    Args:
        linear: Whose matrix it is.
        weights: The block's.
        rank: Of what is added; 0 for nothing.
        lr: Learning rate.
    """

    takes_scaled = True

    def __init__(self, linear: str, weights: Weights, rank: int, lr: float) -> None:
        super().__init__()
        self.weight, self.lr = f"{linear}.weight", lr
        matrix: Tensor = weights[self.weight]
        rows, columns = matrix.shape
        self.left = self.right = None
        if rank:
            signs = torch.randint(0, 2, (rank - 1, columns), generator=torch.Generator().manual_seed(0)) * 2 - 1
            right = torch.cat([torch.ones(1, columns), signs.float()])
            self.left = nn.Parameter(torch.zeros(rows, rank, device=matrix.device))
            self.right = nn.Parameter(right.to(matrix.device))

    def forward(self, weights: Weights) -> Weights:
        if self.left is None or self.right is None:
            return weights
        return {**weights, self.weight: multiplied_out(weights[self.weight]) + factor(self.left, self.right)}

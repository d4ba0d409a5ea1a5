"""Reconstruct the block's full-precision output: mean squared error and LRQuant's negative log cosine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ptql.errors import InputError
from ptql.functional.losses import mean_squared_error, negative_log_cosine
from ptql.parts.objectives.base import Objective, Target, Targets

LOSSES = {"mse": mean_squared_error, "nlc": negative_log_cosine}


class Reconstruction(Objective):
    """A weighted sum of losses, over one or two targets.

    Args:
        mse: Weight of the mean squared error.
        nlc: Weight of the negative log cosine.
        targets: What the output is compared with: `fp`, the fp block on the fp stream (T1), and
            `fp_on_quantised`, the fp block on the quantised stream (T2; OmniQuant's --aug_loss is both).
    """

    def __init__(self, mse: float = 1.0, nlc: float = 1.0, targets: Sequence[Target] = ("fp",)) -> None:
        if mse < 0 or nlc < 0 or mse + nlc == 0:
            raise InputError(f"mse={mse}, nlc={nlc}: weights of losses are 0 or more, and one is above 0")
        if not targets:
            raise InputError("targets=[]: an objective needs a target; take [fp]")
        self.mse = mse
        self.nlc = nlc
        self.targets = tuple(targets)

    def terms(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        weights = {"mse": self.mse, "nlc": self.nlc}
        return {
            f"{name}_{target}": weight * LOSSES[name](output, targets[target])
            for target in self.targets
            for name, weight in weights.items()
            if weight
        }

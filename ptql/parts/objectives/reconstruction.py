"""Reconstruct the block's full-precision output: squared errors and LRQuant's negative log cosine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from ptql.errors import InputError
from ptql.functional.losses import mean_squared_error, negative_log_cosine, relative_squared_error
from ptql.parts.objectives.balance import PlainSum, RunningAverages
from ptql.parts.objectives.base import Objective, Target, Targets

LOSSES = {"mse": mean_squared_error, "nlc": negative_log_cosine, "rse": relative_squared_error}
HEAVIEST = 1e6
Balance = Literal["sum", "ema"]


def check_weights(**weights: float) -> None:
    """Raise `InputError` unless these weights of losses, by name, are usable and one of them counts."""
    given = weights.values()
    if not all(isinstance(w, (int, float)) and 0 <= w <= HEAVIEST for w in given) or sum(given) == 0:
        named = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        raise InputError(
            f"{named}: weights of losses are 0 or more, {HEAVIEST:g} at most, and one is above 0; take mse: 1"
        )


def check_balance(balance: str) -> None:
    """Raise `InputError` unless there is such a balance."""
    if balance not in get_args(Balance):
        raise InputError(f"balance={balance!r}: one of {', '.join(get_args(Balance))} is needed; leave out for sum")


class Reconstruction(Objective):
    """A weighted sum of losses, over one or two targets.

    Args:
        mse: Weight of the mean squared error.
        nlc: Weight of the negative log cosine.
        rse: Weight of the squared error relative to each token's own energy (ours; none of the originals has it).
        targets: What the output is compared with: `fp`, the fp block on the fp stream (T1), and
            `fp_on_quantised`, the fp block on the quantised stream (T2; OmniQuant's --aug_loss is both).
        balance: What is differentiated: `sum`, the loss itself, or `ema`, each kind of loss, over all targets, divided
            by a running average of itself (LRQuant+). Losses that are reported and compared are sums in any case.
        faithful: Running averages start at 1, as in LRQuant+, which leaves an MSE of 1e-3 out of the first hundred
            steps; else at their first values.
    """

    def __init__(
        self,
        mse: float = 1.0,
        nlc: float = 1.0,
        rse: float = 0.0,
        targets: Sequence[Target] = ("fp",),
        balance: Balance = "sum",
        faithful: bool = False,
    ) -> None:
        check_weights(mse=mse, nlc=nlc, rse=rse)
        if isinstance(targets, str) or not targets or any(target not in get_args(Target) for target in targets):
            named = ", ".join(get_args(Target))
            raise InputError(f"targets={targets}: an objective has a list of targets, of {named}; take [fp]")
        check_balance(balance)
        self.mse = mse
        self.nlc = nlc
        self.rse = rse
        self.targets = tuple(targets)
        self.balance: Balance = balance
        self.faithful = faithful

    def terms(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        return {
            f"{name}_{target}": weight * LOSSES[name](output, targets[target])
            for target in self.targets
            for name, weight in self._weights().items()
        }

    def balance_for_block(self) -> nn.Module:
        if self.balance == "sum":
            return PlainSum()
        return RunningAverages(self._kinds(), initial=1.0 if self.faithful else None)

    def _kinds(self) -> list[list[str]]:
        """The names of each kind's terms."""
        return [[f"{name}_{target}" for target in self.targets] for name in self._weights()]

    def _weights(self) -> dict[str, float]:
        """Of the output's losses that count, by name."""
        weights = {"mse": self.mse, "nlc": self.nlc, "rse": self.rse}
        return {name: weight for name, weight in weights.items() if weight}

"""ABQ-LLM's loss: its distribution correction of the output (DLC), and its divergence of attention maps (AKL)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ptql.errors import InputError
from ptql.functional.attention import softmaxed_divergence, symmetric_divergence
from ptql.parts.objectives.base import AttentionView
from ptql.parts.objectives.reconstruction import Balance, Reconstruction, check_balance, check_weights

AklMode = Literal["exact", "faithful"]
AklHeads = Literal["each", "mean"]
AKL = {"exact": symmetric_divergence, "faithful": softmaxed_divergence}


class DistributionCorrection(Reconstruction):
    """Losses of the output over both targets, and one of the attention's probabilities.

    Args:
        mse: Weight of the mean squared errors, which the code has and the paper does not mention.
        dlc: Weight of the double log cosine: the negative log cosines of both targets.
        akl: Weight of the symmetric KL divergence between the attention probabilities of the quantised block and those
            of the fp block on the fp stream; 0 leaves attention alone.
        akl_mode: `exact`, as the paper has it: per query over the keys that it sees; or `faithful`, as the code has it:
            of heads' means, after a second softmax, over all keys, which leaves about 1e-7 of it.
        akl_heads: Compare `each` head, or the `mean` of all heads; `faithful` is of means in any case.
        akl_rows: Queries of a window that are compared, evenly spaced, the last one among them; 0 for all (the
            original), which takes the memory of whole attention maps.
        balance: As in `Reconstruction`; the divergence is a kind of its own.
    """

    faithful = False  # averages of a balance start at their first values: ABQ-LLM has none

    def __init__(
        self,
        mse: float = 1.0,
        dlc: float = 1.0,
        akl: float = 1.0,
        akl_mode: AklMode = "exact",
        akl_heads: AklHeads = "each",
        akl_rows: int = 64,
        balance: Balance = "sum",
    ) -> None:
        # not Reconstruction's own settings: here the losses of the output may all be 0
        check_weights(mse=mse, dlc=dlc, akl=akl)
        check_balance(balance)
        for name, value, kind in (("akl_mode", akl_mode, AklMode), ("akl_heads", akl_heads, AklHeads)):
            if value not in get_args(kind):
                named = ", ".join(get_args(kind))
                raise InputError(f"{name}={value!r}: one of {named} is needed; leave out for {get_args(kind)[0]}")
        if type(akl_rows) is not int or akl_rows < 0:
            raise InputError(f"akl_rows={akl_rows}: a number of queries is above 0, or 0 for all; 64 is usual")
        self.mse = mse
        self.dlc = dlc
        self.akl = akl
        self.akl_mode: AklMode = akl_mode
        self.akl_heads: AklHeads = akl_heads
        self.akl_rows = akl_rows
        self.targets = ("fp", "fp_on_quantised")
        self.balance: Balance = balance

    @property
    def attention(self) -> AttentionView | None:
        if not self.akl:
            return None
        return AttentionView(self.akl_rows, averaged=self.akl_mode == "faithful" or self.akl_heads == "mean")

    def attention_terms(self, made: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        return {"akl": self.akl * AKL[self.akl_mode](made, wanted)}

    def _kinds(self) -> list[list[str]]:
        return [*super()._kinds(), *([["akl"]] if self.akl else [])]

    def _weights(self) -> dict[str, float]:
        weights = {"mse": self.mse, "nlc": self.dlc}
        return {name: weight for name, weight in weights.items() if weight}

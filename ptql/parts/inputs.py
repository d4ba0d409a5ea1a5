"""What is known of the inputs of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputRange:
    """What one pass of the full-precision block saw at the input of a linear layer, per channel: each [in].

    Args:
        low: Smallest value.
        high: Largest value.
        middle: Running mean over samples (0.99 old + 0.01 new) of a sample's mid-range.
        mean: Mean magnitude over all tokens.
    """

    low: Tensor
    high: Tensor
    middle: Tensor
    mean: Tensor

    @classmethod
    def of_magnitudes(cls, absmax: Tensor, mean: Tensor) -> InputRange:
        """Where magnitudes are all that is known: the same on both sides of zero."""
        return cls(-absmax, absmax, torch.zeros_like(absmax), mean)

    @property
    def absmax(self) -> Tensor:
        return self.low.abs().maximum(self.high.abs())

    def taken(self, order: Tensor) -> InputRange:
        """The same of channels in another order."""
        return InputRange(self.low[order], self.high[order], self.middle[order], self.mean[order])


@dataclass(frozen=True)
class SiteRange:
    """What each sample showed at a site of a block, per channel: each [samples, rows, width], rows are heads or 1.

    Args:
        low: Smallest values.
        high: Largest values.
    """

    low: Tensor
    high: Tensor

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Largest and smallest value over all samples, each [rows, width]."""
        return self.high.amax(0), self.low.amin(0)

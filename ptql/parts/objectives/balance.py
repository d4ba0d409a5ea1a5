"""What is differentiated of a loss: its plain sum, or kinds of loss that count alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
SMALLEST = 1e-6
"""Added to an average before it divides."""


class PlainSum(nn.Module):
    """The loss as it is; holds nothing."""

    def forward(self, loss: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """What is differentiated, a scalar, given the loss and its weighted terms by name, scalars too."""
        return loss


class RunningAverages(nn.Module):
    """Each kind of loss divided by a running average of itself, so that its unit and its size do not matter.

    L = sum over kinds of v / (a + 1e-6), with v the sum of a kind's terms and a = 0.95 a + 0.05 v, detached and
    brought up to date before it divides (LRQuant's journal version, its code). What is not finite is kept out of the
    averages, as its step is skipped.

    The averages [kinds] are a buffer, and so part of a checkpoint inside a block. With several processes each divides
    by averages of its own, which begin every step as those of the first process: the ones that a checkpoint holds.

    Args:
        kinds: The names of each kind's terms.
        initial: Of the averages; None starts each at its first value.
    """

    averages: Tensor

    def __init__(self, kinds: Sequence[Sequence[str]], initial: float | None = None) -> None:
        super().__init__()
        self.kinds = tuple(map(tuple, kinds))
        # 0 is an average that has not begun: nothing here may ask the device, so a value says it
        self.register_buffer("averages", torch.full((len(self.kinds),), 0.0 if initial is None else initial))

    def forward(self, loss: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """As `PlainSum`; each call moves the averages."""
        values = torch.stack([torch.stack([terms[name] for name in names]).sum() for names in self.kinds])
        now = values.detach()
        moved = torch.where(self.averages == 0, now, MOMENTUM * self.averages + (1 - MOMENTUM) * now)
        self.averages.copy_(torch.where(now.isfinite().all(), moved, self.averages))
        return (values / (moved + SMALLEST)).sum()

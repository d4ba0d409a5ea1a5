"""What an objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from ptql.parts.objectives.balance import PlainSum

Target = Literal["fp", "fp_on_quantised"]
"""`fp`: the fp block on the fp stream (T1). `fp_on_quantised`: the fp block on the quantised stream (T2)."""

Targets = dict[Target, Tensor]


def total(terms: dict[str, Tensor]) -> Tensor:
    """The loss: the sum of its weighted terms."""
    return torch.stack(list(terms.values())).sum()


class Objective(ABC):
    """Says which targets a block is compared with, and how. Its settings are its constructor's arguments."""

    targets: tuple[Target, ...]

    @abstractmethod
    def terms(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The weighted terms of the loss by name; the loss is their sum. Tensors are [batch, tokens, hidden]."""

    def balance_for_block(self) -> nn.Module:
        """What makes of a block's loss and its terms the scalar that is differentiated; as `PlainSum` is called.

        Only that: the loss that is logged, compared and reported is the sum of the terms in any case. What it holds
        are buffers, which go into the checkpoint inside a block; it neither asks the device nor looks at values.
        """
        return PlainSum()

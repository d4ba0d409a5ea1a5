"""What an objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ptql.parts.objectives.balance import PlainSum

Target = Literal["fp", "fp_on_quantised"]
"""`fp`: the fp block on the fp stream (T1). `fp_on_quantised`: the fp block on the quantised stream (T2)."""

Targets = dict[Target, Tensor]

ATTENTION, ATTENTION_MADE = "attention", "attention_made"
"""Attention probabilities in a batch: of the fp block on the fp stream, a target, and of the quantised block."""


@dataclass(frozen=True)
class AttentionView:
    """Which attention probabilities an objective looks at.

    Args:
        rows: Queries of a window, evenly spaced, the last one among them; 0 for all.
        averaged: The mean over heads, in place of each head's own.
    """

    rows: int = 64
    averaged: bool = False

    def rows_of(self, tokens: int) -> int:
        """Queries that are looked at in a window of so many tokens."""
        return min(self.rows or tokens, tokens)

    def shape(self, heads: int, tokens: int) -> tuple[int, int, int]:
        """Of what is kept of a window: heads, or 1, rows and keys."""
        return 1 if self.averaged else heads, self.rows_of(tokens), tokens


def total(terms: dict[str, Tensor]) -> Tensor:
    """The loss: the sum of its weighted terms."""
    return torch.stack(list(terms.values())).sum()


class Objective(ABC):
    """Says which targets a block is compared with, and how. Its settings are its constructor's arguments."""

    targets: tuple[Target, ...]

    @property
    def attention(self) -> AttentionView | None:
        """The attention probabilities that it looks at; None, the usual case, costs nothing."""
        return None

    @abstractmethod
    def terms(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The weighted terms of the loss by name; the loss is their sum. Tensors are [batch, tokens, hidden]."""

    def attention_terms(self, made: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """The weighted terms of `attention`, if there is any: of the quantised block's probabilities, and those of the
        fp block on the fp stream, each [batch, heads or 1, rows, keys]."""
        return {}

    def balance_for_block(self) -> nn.Module:
        """What makes of a block's loss and its terms the scalar that is differentiated; as `PlainSum` is called.

        Only that: the loss that is logged, compared and reported is the sum of the terms in any case. What it holds
        are buffers, which go into the checkpoint inside a block; it neither asks the device nor looks at values.
        """
        return PlainSum()


def all_terms(objective: Objective, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weighted term of the loss by name: of the output, and of the attention where the objective looks at it.

    Args:
        objective: What compares.
        batch: Its targets, among others, and what a block made of the input: `output`, and the attention's two.
    """
    targets: Targets = {name: batch[name] for name in objective.targets}
    terms = objective.terms(batch["output"], targets)
    if objective.attention is None:
        return terms
    return {**terms, **objective.attention_terms(batch[ATTENTION_MADE], batch[ATTENTION])}

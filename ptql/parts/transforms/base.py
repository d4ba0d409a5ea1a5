"""What a transform is: it rewrites a block's weights so that the full-precision function stays the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ptql.families import BlockLayout
from ptql.functional.scaled import Scaled
from ptql.parts.inputs import InputRange, SiteRange
from ptql.recipe import ActivationScheme, IntScheme

Matrix = Tensor | Scaled
"""A matrix of a block: a tensor, or one that is scaled where it is rounded."""

Weights = dict[str, Any]
"""Every parameter of a block by its name in the block: tensors, or `Scaled` for the matrices of linear layers."""


@dataclass(frozen=True)
class BlockFacts:
    """What a part may know when it is set up for a block.

    Args:
        layout: Where things are.
        weights: The block's own, float32, biases that a transform asked for included (zero).
        ranges: By name of the linear layer.
        index: Of the block, from 0.
        total: Number of blocks.
        sites: What the full-precision block showed on the quantised stream, by site (`ptql.nn.static_rounding`); None
            unless a transform `watches` it, and where a block is finished already.
    """

    layout: BlockLayout
    weights: Weights
    ranges: dict[str, InputRange]
    index: int
    total: int
    sites: Mapping[str, SiteRange] | None = None


@dataclass(frozen=True)
class AddedBiases:
    """Biases that a transform needs and the model does not have, by module name in the block."""

    norms: frozenset[str] = field(default_factory=frozenset)
    linears: frozenset[str] = field(default_factory=frozenset)

    def __or__(self, other: AddedBiases) -> AddedBiases:
        return AddedBiases(self.norms | other.norms, self.linears | other.linears)


class TransformState(nn.Module, ABC):
    """A transform of one block: its learnables, their learning rate, and the rewriting itself."""

    lr: float
    takes_scaled = False
    """Whether `forward` takes `Scaled` matrices beside tensors, and only scales them; others are given tensors."""

    @property
    def labels(self) -> dict[str, Tensor]:
        """The cluster of each channel as the block has them now, [rows, width], by site; for fixed grids and for scales
        of weights."""
        return {}

    def after(self, facts: BlockFacts) -> BlockFacts:
        """What parts that come later are told of the block; other than `facts` where channels change places."""
        return facts

    @abstractmethod
    def forward(self, weights: Weights) -> Weights:
        """New weights, differentiable in the learnables; the given dictionary is not changed."""

    def rate(self, name: str) -> float:
        """Learning rate of the parameter `name`."""
        return self.lr

    def project(self) -> None:
        """Bring the learnables back to where they are allowed; called before each step."""
        return None


class Transform(ABC):
    """The settings of a transform, as in a recipe. Its settings are its constructor's arguments."""

    watches = False
    """Whether it has to know `BlockFacts.sites`, which takes a pass more over each block."""

    def applies(self, weight: IntScheme, activation: ActivationScheme) -> bool:
        """Whether the recipe's number formats call for this transform."""
        return True

    def added_biases(self, layout: BlockLayout, biased: frozenset[str]) -> AddedBiases:
        """The biases it needs. `biased`: the linear layers that have one of their own."""
        return AddedBiases()

    def gathered_norms(self, layout: BlockLayout) -> frozenset[str]:
        """The norms whose input it wants in another order, which its `forward` gives beside their weights.

        Raises:
            InputError: The layout has no place for what it does.
        """
        return frozenset()

    def site_clusters(self) -> dict[str, int]:
        """Clusters of channels that it makes at most, by site; for fixed grids and for scales of weights. A transform
        that makes some is used where weights want them, whatever `applies` says."""
        return {}

    @abstractmethod
    def for_block(self, facts: BlockFacts) -> TransformState:
        """Learnables for one block, at their initial values."""

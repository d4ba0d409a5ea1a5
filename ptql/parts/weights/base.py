"""What a weight quantiser is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ptql.errors import InputError
from ptql.functional.buffers import write_into
from ptql.functional.scaled import Scaled
from ptql.parts.inputs import InputRange
from ptql.parts.weights.column_clusters import ColumnClusters
from ptql.recipe import IntScheme, LayerSchemes


class LinearQuantizer(nn.Module, ABC):
    """The quantiser of one matrix: its learnables, their learning rate, and the rounding."""

    lr: float
    remark: str | None = None
    """What a user should know of how the matrix was encoded last."""

    def rate(self, name: str) -> float:
        """Learning rate of the parameter `name`."""
        return self.lr

    def set_rate(self, lr: float) -> None:
        """Let all that is learned have this learning rate."""
        self.lr = lr

    def begin_on(self, w: Tensor, inputs: InputRange | None = None) -> None:
        """Set what is learned by the weights [out, in], as transforms fold them when nothing is learned yet, and by
        what was seen of the inputs that they multiply, if the recipe asks for it."""
        return None

    @abstractmethod
    def fake(self, w: Tensor) -> Tensor:
        """Rounded weights [out, in], differentiable in `w` and in the learnables."""

    def fake_into(self, w: Scaled, out: Tensor) -> Tensor:
        """As `fake`, written to `out` [out, in] in its dtype; differentiable in the factors and in the learnables."""
        return write_into(self.fake(w.dense()), out)

    @abstractmethod
    def encode(self, w: Tensor) -> dict[str, Tensor]:
        """What is stored for `w` [out, in]: packed codes and whatever decodes them, by tensor name."""

    def encode_on(self, w: Tensor, moments: Tensor) -> dict[str, Tensor]:
        """As `encode`, where `moments` [in, in] are known: 2 E[x x^T] of the inputs that `w` will multiply."""
        return self.encode(w)

    @abstractmethod
    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        """The float32 weights [out, in] that stored tensors stand for, exactly as a loaded model has them."""


class WeightQuantizer(ABC):
    """The settings of a weight quantiser, as in a recipe. Its settings are its constructor's arguments."""

    begins_on_weights: bool = False
    """Whether its quantisers want `begin_on`, which takes a folding of the block."""
    begins_on_inputs: bool = False
    """Whether that wants to know the inputs, which takes a pass of the folded block."""
    factor_rank: int = 0
    """Rank of the factors that are stored beside the codes, as `PackedLinear` has them; 0 for none."""
    takes_transforms: bool = True
    """Whether its quantisers give a gradient to weights that transforms fold."""
    chooses_channels: bool = False
    """Whether sizes of inputs decide how a channel is stored."""
    takes_clusters: bool = False
    """Whether its quantisers have scales of clusters; `for_linear` is told these where the format asks for them."""
    wants_moments: bool = False
    """Whether its quantisers encode by second moments of inputs (`encode_on`), a pass of the block for each input."""

    def check(self, schemes: LayerSchemes) -> None:
        """Raise `InputError` unless it can round to these formats."""
        for scheme in (schemes.default, *schemes.exceptions.values()):
            if scheme.salient is not None:
                raise InputError(
                    f"weight: salient={scheme.salient} with {type(self).__name__}, whose codes are all alike; use the "
                    "weight quantiser SalientBinary (-c methods/ptq161), or salient: null"
                )
            if scheme.by_cluster and not self.takes_clusters:
                raise InputError(
                    f"weight: clustered=true with {type(self).__name__}, which has no scales of clusters; use the "
                    "weight quantiser Affine or Gptq, or clustered: false (--model.weight.clustered false)"
                )

    @abstractmethod
    def for_linear(
        self,
        name: str,
        weight: Tensor,
        scheme: IntScheme,
        inputs: InputRange | None = None,
        clusters: ColumnClusters | None = None,
    ) -> LinearQuantizer:
        """The quantiser of the matrix `name`, [out, in], at its initial state.

        Args:
            name: In the block.
            weight: The matrix, as transforms fold it at first.
            scheme: Its format.
            inputs: Of the layer, where they were observed.
            clusters: Of its columns, where the format is `clustered`; without `takes_clusters`, it never is.
        """

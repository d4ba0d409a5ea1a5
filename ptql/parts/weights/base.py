"""What a weight quantiser is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ptql.functional.buffers import write_into
from ptql.functional.scaled import Scaled
from ptql.recipe import IntScheme


class LinearQuantizer(nn.Module, ABC):
    """The quantiser of one matrix: its learnables, their learning rate, and the rounding."""

    lr: float

    def begin_on(self, w: Tensor) -> None:
        """Set what is learned by the weights [out, in], as transforms fold them when nothing is learned yet."""
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

    @abstractmethod
    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        """The float32 weights [out, in] that stored tensors stand for, exactly as a loaded model has them."""


class WeightQuantizer(ABC):
    """The settings of a weight quantiser, as in a recipe. Its settings are its constructor's arguments."""

    begins_on_weights: bool = False
    """Whether its quantisers want `begin_on`, which takes a folding of the block."""
    factor_rank: int = 0
    """Rank of the factors that are stored beside the codes, as `PackedLinear` has them; 0 for none."""

    @abstractmethod
    def for_linear(self, name: str, weight: Tensor, scheme: IntScheme) -> LinearQuantizer:
        """The quantiser of the matrix `name`, [out, in], at its initial state."""

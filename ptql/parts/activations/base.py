"""What an activation quantiser is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ptql.families import BlockLayout
from ptql.nn.quant_linear import Rounding
from ptql.recipe import ActivationScheme, StaticScheme


class ActivationQuantizer(ABC):
    """Says where activations are rounded in a block, and how. Its settings are its constructor's arguments."""

    @abstractmethod
    def for_linear(self, name: str, scheme: ActivationScheme) -> Rounding | None:
        """What rounds the input of the linear layer `name` (relative to the block), or None.

        Layers that read the same input share what is returned for the first of them.
        """

    @abstractmethod
    def for_attention(self, scheme: ActivationScheme) -> Rounding | None:
        """What rounds queries, [batch, heads, tokens, head size], or None."""

    def for_cache(self, scheme: ActivationScheme) -> Rounding | None:
        """What rounds keys and values, which a cache holds; by default as queries, to their own bits."""
        return self.for_attention(replace(scheme, bits=scheme.cache_bits))

    def fused(self, rounding: Rounding) -> Rounding:
        """The same rounding by GPU kernels where there are any; what is returned must round alike."""
        return rounding

    def static_scheme(
        self, block: nn.Module, layout: BlockLayout, scheme: ActivationScheme, clusters: Mapping[str, int]
    ) -> StaticScheme | None:
        """What is rounded on fixed grids in a block, instead of the above; None where nothing is. Who finds them asks a
        `StaticClusters`, or a class of its kind, how.

        Args:
            block: One of the model, for its shapes.
            layout: Of the block.
            scheme: Bits.
            clusters: Of channels at most, by site; 1 where it is not said.
        """
        return None

"""A linear layer on packed weights that share scales by clusters of input channels (RPTQ)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ptql.functional import cluster_scales
from ptql.functional.packing import unpack_levels
from ptql.nn.packed_linear import PackedLinear, packed_tensors, times_factors
from ptql.recipe import IntScheme

# axes: out, in = weight rows, columns; g = clusters of columns that share a scale; k = rank of the factor

MOST_OF_A_MATRIX = 2**15
"""Clusters: heads have some each, and their numbers are int16."""


def number_dtype(clusters: int) -> torch.dtype:
    """In which the numbers of so many clusters are stored."""
    return torch.uint8 if clusters <= 2**8 else torch.int16


def clustered_tensors(
    codes: UInt8[Tensor, "out in"],
    scale: Float[Tensor, "out g"],
    zero: UInt8[Tensor, "out g"] | None,
    levels: int,
    cluster: Int[Tensor, " in"],
    factors: tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]] | None = None,
) -> dict[str, Tensor]:
    """What is stored of one linear layer, from the result of `cluster_scales.encode`, the number of each column's
    cluster, and factors if there are any; keys as in `ClusteredLinear`."""
    return {
        **packed_tensors(codes, scale, zero, levels, factors),
        "group": cluster.to(number_dtype(scale.shape[1])),
    }


def dense_from_clustered(
    tensors: dict[str, Tensor], in_features: int, scheme: IntScheme
) -> Float[Tensor, "out {in_features}"]:
    """The float32 weight that `clustered_tensors` stands for.

    Raises:
        ValueError: The tensors are too long or too short for `in_features` and `scheme`.
    """
    scale, levels = tensors["scale"].view(torch.float16), scheme.levels
    zero = None if scheme.symmetric else unpack_levels(tensors["zero"], levels, scale.shape[1])
    codes = unpack_levels(tensors["codes"], levels, in_features)
    rounded = cluster_scales.dequantize(codes, scale, zero, levels, tensors["group"].long())
    return times_factors(rounded, tensors)


class ClusteredLinear(PackedLinear):
    """A `PackedLinear` whose groups are clusters: g of them, of columns that need not be neighbours.

    Beside its tensors: `group` [in], the number of each column's cluster: uint8, or int16 where g is more than 256.

    Args:
        clusters: g; of some, a matrix may have no columns.
        others: As of `PackedLinear`.
    """

    group: Tensor

    def __init__(self, *, clusters: int, **others: Any) -> None:
        super().__init__(**others, groups=clusters)
        numbers = torch.zeros(self.in_features, dtype=number_dtype(clusters), device=self.scale.device)
        self.hold("group", numbers)

    def dense_weight(self) -> Float[Tensor, "out in"]:
        return dense_from_clustered(dict(self.named_parameters()), self.in_features, self.scheme)

"""The affine quantiser of a matrix whose columns share scales by clusters (RPTQ)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptql.functional import affine, cluster_scales
from ptql.functional.buffers import write_into
from ptql.functional.clipping import best_share_of_clusters
from ptql.functional.scaled import Scaled
from ptql.nn.clustered_linear import clustered_tensors, dense_from_clustered
from ptql.parts.weights.affine_linear import AffineLinear
from ptql.parts.weights.column_clusters import ColumnClusters


class ClusteredAffineLinear(AffineLinear):
    """`AffineLinear` of a [out, in] matrix whose groups are clusters of columns.

    Without the numbers of clusters it can decode, and nothing else. No kernel knows clusters: a step multiplies the
    matrix out before it is rounded.

    Args:
        given: As of `AffineLinear`, or of a class beside this one.
        clusters: Of the matrix's columns.
        named: As `given`.
    """

    cluster: Tensor

    def __init__(self, *given: Any, clusters: ColumnClusters, **named: Any) -> None:
        super().__init__(*given, groups=clusters.count, **named)
        self.count = clusters.count
        # they follow from the source and its inputs, and are stored with the codes
        self.register_buffer("cluster", clusters.numbers, persistent=False)

    @property
    def grouping(self) -> int | Tensor:
        return self.cluster

    def fake_into(self, w: Scaled, out: Tensor) -> Tensor:
        return write_into(self.fake(w.dense()), out)

    def share_of_least_error(self, w: Tensor, importance: Tensor | None) -> Tensor:
        s = self.scheme
        return best_share_of_clusters(w, self.cluster, self.count, s.levels, s.symmetric, importance)

    def clipped_range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return cluster_scales.weight_range(w, self.cluster, self.count, self.lower, self.upper)

    def rounded(self, w: Tensor) -> Tensor:
        s = self.scheme
        scale, zero = affine.scale_and_zero(*self.clipped_range(w), s.levels, s.symmetric)
        return cluster_scales.fake_quantize(w, scale, zero, self.cluster, s.levels)

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        s, kind = self.scheme, getattr(torch, self.scheme.scale_dtype)
        ends = self.clipped_range(w)
        return self.packed(*cluster_scales.encode(w, *ends, s.levels, self.cluster, s.symmetric, kind))

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        return clustered_tensors(codes, scale, zero, self.scheme.levels, self.cluster, self.factors)

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        return dense_from_clustered(stored, self.row, self.scheme)

"""Packed weights that share scales by clusters, against the weights that the encoder meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.functional import cluster_scales
from ptql.nn.clustered_linear import ClusteredLinear, clustered_tensors, dense_from_clustered
from ptql.recipe import IntScheme

SCHEMES = [
    IntScheme(4, clustered=True),
    IntScheme(3, symmetric=True, clustered=True),
    IntScheme(2, symmetric=True, balanced=True, clustered=True),
    IntScheme(1, balanced=True, clustered=True),
    IntScheme(8, clustered=True),
]
COLUMNS, CLUSTERS = 37, 5


def encoded(scheme: IntScheme, clusters: int = CLUSTERS) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    torch.manual_seed(0)
    w, cluster = torch.randn(6, COLUMNS), torch.randint(0, CLUSTERS - 1, (COLUMNS,))  # the last has no column
    ends = cluster_scales.weight_range(w, cluster, clusters)
    return cluster, cluster_scales.encode(w, *ends, scheme.levels, cluster, scheme.symmetric)


def layer_of(scheme: IntScheme, clusters: int = CLUSTERS, rank: int = 0) -> ClusteredLinear:
    given = {"in_features": COLUMNS, "out_features": 6, "scheme": scheme, "bias": False, "rounding": None}
    return ClusteredLinear(**given, factor_rank=rank, clusters=clusters)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_stored_tensors_give_back_what_was_encoded(scheme: IntScheme, rank: int) -> None:
    cluster, (codes, scale, zero) = encoded(scheme)
    factors = (torch.randn(6, rank), torch.randn(rank, COLUMNS)) if rank else None
    tensors = clustered_tensors(codes, scale, zero, scheme.levels, cluster, factors)
    expected = torch.zeros(6, COLUMNS, dtype=torch.float64)
    for i in range(6):
        for j in range(COLUMNS):
            c = int(cluster[j])
            middle = scheme.levels // 2 if zero is None else int(zero[i, c])
            expected[i, j] = (int(codes[i, j]) - middle) * float(scale[i, c])
            if factors is not None:
                left, right = (part.half() for part in factors)
                expected[i, j] *= sum(float(left[i, k]) * float(right[k, j]) for k in range(rank))
    layer = layer_of(scheme, rank=rank)
    assert {k: (v.shape, v.dtype) for k, v in layer.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in tensors.items()
    }
    layer.load_state_dict(tensors)
    torch.testing.assert_close(layer.dense_weight().double(), expected, rtol=1e-6, atol=1e-6)
    assert rank or torch.equal(layer.dense_weight().double(), expected)
    before, x = layer.dense_weight(), torch.randn(3, COLUMNS)
    assert torch.equal(before, dense_from_clustered(tensors, COLUMNS, scheme))
    assert torch.equal(layer.to_dense()(x), layer(x))
    assert torch.equal(layer.to(torch.bfloat16).dense_weight(), before)


@pytest.mark.parametrize(("clusters", "dtype"), [(256, torch.uint8), (257, torch.int16), (2**15, torch.int16)])
def test_numbers_take_a_byte_as_long_as_it_holds_them(clusters: int, dtype: torch.dtype) -> None:
    cluster, stored = torch.arange(COLUMNS) + clusters - COLUMNS, encoded(SCHEMES[0], clusters)[1]
    tensors = clustered_tensors(*stored, 16, cluster)
    assert tensors["group"].dtype == dtype == layer_of(SCHEMES[0], clusters).group.dtype
    assert torch.equal(tensors["group"].long(), cluster)


def test_tensors_of_another_length_are_refused() -> None:
    cluster, stored = encoded(SCHEMES[0])
    tensors = clustered_tensors(*stored, 16, cluster)
    with pytest.raises(ValueError, match="19 bytes a row: 40 codes of 4 bits take 20"):
        dense_from_clustered(tensors, 40, SCHEMES[0])

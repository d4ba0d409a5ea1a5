"""What a weight quantiser is told of clusters: which input channels of a matrix share a scale."""

# axes: in = columns of a matrix; rows, width = heads and channels of a head of what it reads, or 1 and all channels

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ptql.families import BlockLayout
from ptql.nn.static_rounding import INPUTS, site_shapes


@dataclass(frozen=True)
class ColumnClusters:
    """The clusters of a matrix's input channels.

    Args:
        count: How many there are at most, the same in all blocks.
        numbers: That of each column's cluster, below `count`; None where a block is finished, which has them stored.
    """

    count: int
    numbers: Int[Tensor, " in"] | None


def cluster_counts(block: nn.Module, layout: BlockLayout, made: Mapping[str, int]) -> dict[str, int]:
    """How many clusters the columns of each linear layer of `block` have at most, by name.

    Each head of what the output projection reads has its own. One where none are made of what a layer reads.

    Args:
        block: Any of the model.
        layout: Of the block.
        made: `Transform.site_clusters` of the recipe: in each row of a site.
    """
    shapes, counts = site_shapes(block, layout), {}
    for site, linears in zip(INPUTS, layout.linears, strict=True):
        rows, width = shapes[site]
        counts |= dict.fromkeys(linears, rows * min(made[site], width) if site in made else 1)
    return counts


def column_clusters(
    block: nn.Module, layout: BlockLayout, made: Mapping[str, int], labels: Mapping[str, Tensor]
) -> dict[str, ColumnClusters]:
    """The clusters of each linear layer's columns, by name.

    Args:
        block: The one in hand.
        layout: Of the block.
        made: As of `cluster_counts`.
        labels: The cluster of each channel by site [rows, width], as transforms tell it; of a finished block, nothing.
    """
    counts, found = cluster_counts(block, layout, made), {}
    for site, linears in zip(INPUTS, layout.linears, strict=True):
        for name in linears:
            weight, numbers = block.get_parameter(f"{name}.weight"), None
            if site in labels:
                numbers = cluster_numbers(labels[site], counts[name])
            elif site not in made:
                numbers = torch.zeros(weight.shape[1], dtype=torch.long, device=weight.device)
            found[name] = ColumnClusters(counts[name], numbers)
    return found


def cluster_numbers(labels: Int[Tensor, "rows width"], count: int) -> Int[Tensor, " in"]:
    """The number of each column's cluster among all `count` of a matrix; each row of `labels` counts from 0."""
    rows = len(labels)
    return (labels + torch.arange(rows, device=labels.device)[:, None] * (count // rows)).flatten()

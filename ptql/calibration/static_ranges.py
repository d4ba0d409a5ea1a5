"""Finds the fixed grids of a block: ranges of each cluster of channels on the quantised stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.families import BlockLayout
from ptql.functional.static import SHARES, cluster_ranges, range_errors, running_mean, static_grid
from ptql.nn.static_rounding import StaticRounding, grids_of
from ptql.parts.activations import ActivationQuantizer, StaticClusters
from ptql.parts.transforms import TransformState

Range = tuple[Tensor, Tensor]
"""Smallest and largest value, each [rows, clusters]."""


@torch.no_grad()
def find_grids(task: BlockTask, streams: Streams, layout: BlockLayout, quantizer: ActivationQuantizer) -> None:
    """Fill the grids of the task's student, if it has any, from what it shows with weights as transforms begin, neither
    these nor activations rounded. What is learned later learns with these grids.

    Args:
        task: Of the block, before it learns.
        streams: Stand before the block.
        layout: Of the block.
        quantizer: The recipe's.
    """
    grids = grids_of(task.student)
    if not grids:
        return
    assert isinstance(quantizer, StaticClusters)
    labels = {site: _labels(site, grid, task) for site, grid in grids.items()}
    weights = task.folded_weights()
    seen = streams.watch(task.student, layout, weights)
    ranges: dict[str, Range] = {}
    for site, grid in grids.items():
        low, high = cluster_ranges(seen[site].low, seen[site].high, labels[site], grid.site.clusters)
        ranges[site] = (
            (running_mean(low), running_mean(high)) if quantizer.ranges == "ema" else (low.amin(0), high.amax(0))
        )
    if quantizer.ranges == "mse":
        errors: dict[str, Tensor] = {}

        def add(site: str, x: Tensor) -> None:
            if site in grids:
                found = range_errors(x, *ranges[site], labels[site], grids[site].site.bits, quantizer.faithful)
                errors[site] = errors[site] + found if site in errors else found

        streams.show_sites(task.student, layout, add, weights)
        shares = torch.tensor(SHARES, device=streams.device)
        for site, found in errors.items():
            share = shares[streams.ranks.mean(found).argmin(0)]
            ranges[site] = ranges[site][0] * share, ranges[site][1] * share
    for site, grid in grids.items():
        scale, zero = static_grid(*ranges[site], grid.site.bits, quantizer.faithful)
        grid.fill(scale, zero, labels[site])


def _labels(site: str, grid: StaticRounding, task: BlockTask) -> Tensor:
    """The cluster of each channel of a site, as the transforms say; all in one where none says it."""
    for transform in task.transforms:
        assert isinstance(transform, TransformState)
        if site in transform.labels:
            return transform.labels[site]
    return torch.zeros_like(grid.cluster, dtype=torch.long)

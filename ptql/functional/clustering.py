"""K-means of channels by what was seen of them, all heads at once, the same on every run.

Source: RPTQ (arXiv 2304.01089) section 3.2, where channels of like range share one grid.
"""

# axes: heads = clustered each by itself; channels = points; features = of a point; k = centres

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

ROUNDS = 100
"""Of moving centres at most; a few dozen are usual."""


def cluster_labels(
    points: Float[Tensor, "heads channels features"], clusters: int, restarts: int = 10, seed: int = 0
) -> Int[Tensor, "heads channels"]:
    """The cluster of each channel, from 0 and without gaps: of `restarts` beginnings the one with the least inertia.

    Clusters are numbered by the first feature of their centre. Where a head has fewer distinct points than `clusters`,
    it gets as many clusters as it has points. Beginnings come from a generator of their own, so that neither a run's
    random numbers nor the order of its blocks matter; all is computed in float64.
    """
    wide = points.double()
    generator = torch.Generator().manual_seed(seed)
    best_labels = best_inertia = None
    for _ in range(restarts):
        labels, inertia = settled(wide, spread_centres(wide, clusters, generator))
        if best_labels is None or best_inertia is None:
            best_labels, best_inertia = labels, inertia
            continue
        better = inertia < best_inertia
        best_labels = torch.where(better[:, None], labels, best_labels)
        best_inertia = torch.where(better, inertia, best_inertia)
    assert best_labels is not None
    return numbered(wide, best_labels, clusters)


def spread_centres(
    points: Float[Tensor, "heads channels features"], clusters: int, generator: torch.Generator
) -> Float[Tensor, "heads k features"]:
    """Points to begin at, far from each other: each with a chance that grows with the square of its distance to those
    before it (k-means++, Arthur and Vassilvitskii 2007). With fewer distinct points some are chosen twice."""
    heads, channels, features = points.shape
    distance = points.new_ones(heads, channels)
    chosen = []
    for index in range(clusters):
        chances = distance.cumsum(1)
        drawn = torch.rand(heads, 1, dtype=torch.float64, generator=generator).to(points.device) * chances[:, -1:]
        at = (chances <= drawn).sum(1).clamp(max=channels - 1)
        centre = points.gather(1, at.view(heads, 1, 1).expand(-1, -1, features))
        chosen.append(centre)
        away = (points - centre).square().sum(2)
        distance = away if index == 0 else torch.minimum(distance, away)
    return torch.cat(chosen, dim=1)


def settled(
    points: Float[Tensor, "heads channels features"], centres: Float[Tensor, "heads k features"]
) -> tuple[Int[Tensor, "heads channels"], Float[Tensor, " heads"]]:
    """Each point's nearest centre once no point changes its centre any more, and the sum of squared distances (Lloyd).

    Of centres as near as each other the first counts. A centre that loses all of its points stays where it is.
    """
    labels = None
    for _ in range(ROUNDS):
        nearest = _squared_distances(points, centres).argmin(2)
        if labels is not None and torch.equal(nearest, labels):
            break
        labels = nearest
        # a product with ones and zeros, as sums by index come in another order each time on a GPU
        members = _members(labels, centres.shape[1])
        counts = members.sum(1)[:, :, None]
        means = members.mT @ points / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)
    assert labels is not None
    return labels, _squared_distances(points, centres).gather(2, labels[:, :, None]).sum((1, 2))


def numbered(
    points: Float[Tensor, "heads channels features"], labels: Int[Tensor, "heads channels"], clusters: int
) -> Int[Tensor, "heads channels"]:
    """The same clusters by the first feature of their centre, ascending; empty ones have no number."""
    members = _members(labels, clusters)
    counts = members.sum(1)
    first = (members.mT @ points[:, :, :1]).squeeze(2) / counts.clamp_min(1)
    first = first.masked_fill(counts == 0, torch.inf)  # behind all others
    place = first.argsort(stable=True, dim=1).argsort(dim=1)
    return place.gather(1, labels)


def with_even_sizes(labels: Int[Tensor, "heads channels"], multiple: int) -> Int[Tensor, "heads channels"]:
    """The same labels with sizes that are multiples of `multiple`, all but the last: in sorted order, the borders
    between clusters are moved to the nearest multiple. A cluster that vanishes leaves no gap."""
    heads, channels = labels.shape
    order = labels.argsort(stable=True, dim=1)
    moved = torch.empty_like(labels)
    for head in range(heads):
        borders = labels[head].bincount().cumsum(0)[:-1]
        borders = torch.unique((borders + multiple // 2) // multiple * multiple)
        borders = borders[(borders > 0) & (borders < channels)]
        places = torch.arange(channels, device=labels.device)
        moved[head, order[head]] = torch.bucketize(places, borders, right=True)
    return moved


def channel_order(labels: Int[Tensor, "heads channels"]) -> Int[Tensor, "heads channels"]:
    """Which channel comes where, so that those of a cluster are neighbours; inside a cluster as they were."""
    return labels.argsort(stable=True, dim=1)


def _squared_distances(
    points: Float[Tensor, "heads channels features"], centres: Float[Tensor, "heads k features"]
) -> Float[Tensor, "heads channels k"]:
    pairs = zip(points.unbind(2), centres.unbind(2), strict=True)  # of features: all at once would be far more memory
    return sum((point[:, :, None] - centre[:, None]).square() for point, centre in pairs)  # type: ignore[return-value]


def _members(labels: Int[Tensor, "heads channels"], clusters: int) -> Float[Tensor, "heads channels {clusters}"]:
    return F.one_hot(labels, clusters).double()

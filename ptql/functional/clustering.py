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
STILL = 1e-4
"""Of the features' mean variance: centres that move by less, in the sum of their squares, have settled (as in
scikit-learn, which RPTQ's code calls)."""


def cluster_labels(
    points: Float[Tensor, "heads channels features"], clusters: int, restarts: int = 10, seed: int = 0
) -> Int[Tensor, "heads channels"]:
    """The cluster of each channel, from 0 and without gaps: of `restarts` beginnings the one with the least inertia.

    Clusters are numbered by the first feature of their centre. Where a head has fewer distinct points than `clusters`,
    it gets as many clusters as it has points. Beginnings come from a generator of their own, so that neither a run's
    random numbers nor the order of its blocks matter; all is computed in float64.
    """
    wide, heads = points.double(), len(points)
    draws = torch.stack([_draws(clusters, heads, seed + restart) for restart in range(restarts)], dim=1)
    repeated = wide.repeat(restarts, 1, 1)  # all beginnings at once: most sites are small beside a step's overhead
    labels, inertia = settled(repeated, spread_centres(repeated, draws.flatten(1).to(wide.device)), STILL)
    best = inertia.view(restarts, heads).argmin(0)
    chosen = labels.view(restarts, heads, -1)[best, torch.arange(heads, device=wide.device)]
    return numbered(wide, chosen, clusters)


def _draws(clusters: int, heads: int, seed: int) -> Float[Tensor, "{clusters} {heads}"]:
    """Random numbers from 0 to 1 of one beginning, which further beginnings leave as they are."""
    return torch.rand(clusters, heads, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spread_centres(
    points: Float[Tensor, "heads channels features"], draws: Float[Tensor, "k heads"]
) -> Float[Tensor, "heads k features"]:
    """Points to begin at, far from each other: each with a chance that grows with the square of its distance to those
    before it (k-means++, Arthur and Vassilvitskii 2007), as random `draws` from 0 to 1 say. With fewer distinct points
    some are chosen twice."""
    heads, channels, features = points.shape
    distance = points.new_ones(heads, channels)
    chosen = []
    for index, draw in enumerate(draws):
        chances = distance.cumsum(1)
        at = (chances <= draw[:, None] * chances[:, -1:]).sum(1).clamp(max=channels - 1)
        centre = points.gather(1, at.view(heads, 1, 1).expand(-1, -1, features))
        chosen.append(centre)
        away = (points - centre).square().sum(2)
        distance = away if index == 0 else torch.minimum(distance, away)
    return torch.cat(chosen, dim=1)


def settled(
    points: Float[Tensor, "heads channels features"], centres: Float[Tensor, "heads k features"], still: float = 0.0
) -> tuple[Int[Tensor, "heads channels"], Float[Tensor, " heads"]]:
    """Each point's nearest centre once no point changes its centre any more, and the sum of squared distances (Lloyd).

    Of centres as near as each other the first counts. A centre that loses all of its points stays where it is. With
    `still`, a part of the features' mean variance, centres in all heads need not come to rest altogether.
    """
    labels, least = None, still * points.var(1, correction=0).mean(1)
    for _ in range(ROUNDS):
        nearest = _squared_distances(points, centres).argmin(2)
        if labels is not None and torch.equal(nearest, labels):
            break
        labels = nearest
        # a product with ones and zeros, as sums by index come in another order each time on a GPU
        members = _members(labels, centres.shape[1])
        counts = members.sum(1)[:, :, None]
        means = members.mT @ points / counts.clamp_min(1)
        before, centres = centres, torch.where(counts > 0, means, centres)
        if still and bool(((centres - before).square().sum((1, 2)) <= least).all()):
            break
    nearest = _squared_distances(points, centres).min(2)
    return nearest.indices, nearest.values.sum(1)


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

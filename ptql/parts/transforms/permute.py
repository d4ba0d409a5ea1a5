"""RPTQ's reordering: channels of like range become neighbours, so that each run of them can share a grid."""

# axes: kv = heads of keys and values; group = query heads of each; size = channels of a head

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ptql.errors import InputError
from ptql.families import AttentionSites, BlockLayout, Rows
from ptql.functional.clustering import channel_order, cluster_labels, with_even_sizes
from ptql.parts.transforms.base import BlockFacts, Transform, TransformState, Weights
from ptql.recipe import MOST_CLUSTERS, UNQUANTISED, ActivationScheme, IntScheme

Site = Literal["qkv", "qkt", "out", "fc1", "fc2"]
SITES: tuple[Site, ...] = get_args(Site)
USUAL: dict[Site, int] = {"qkv": 32, "qkt": 4, "out": 4, "fc1": 32, "fc2": 32}
NORMED = ("qkv", "fc1")


class Permute(Transform):
    """Clusters channels by the largest and the smallest value that each had, and sorts them by cluster.

    The function stays the same: what makes a channel and what reads it are sorted alike. Sites, with RPTQ's numbers:
    `qkv` (R1) and `fc1` (R4), what norms give: the norm gathers its input, and columns follow. `qkt` (R2), queries and
    keys, in each head. `out` (R3), values in each head, to the output projection. `fc2` (R5), inside the MLP.
    With grouped heads, an order is that of a head of keys and values, and of all query heads that read it.

    Where RoPE rotates queries and keys, or norms follow their projections, `qkt` clusters but does not sort: a grid
    knows its channels by number. That rounds the same, and leaves RoPE's pairs where the model rotates them.

    Args:
        sites: Where channels are clustered.
        clusters: Of each site that differs from RPTQ's 32 of `qkv`, `fc1` and `fc2` and 4 a head of `qkt` and `out`.
        multiple: Sizes of clusters are multiples of this, as far as there are channels; 1 leaves them as they are. 16
            and 32 are what matrix units take at a time.
        restarts: Beginnings of k-means, of which the best counts.
    """

    watches = True

    def __init__(
        self,
        sites: Sequence[Site] = SITES,
        clusters: dict[str, int] | None = None,
        multiple: int = 1,
        restarts: int = 10,
    ) -> None:
        named = ", ".join(SITES)
        if not isinstance(sites, Sequence) or isinstance(sites, str) or any(s not in SITES for s in sites):
            raise InputError(f"sites={sites!r}: a list of {named} is needed; leave out for all")
        for site, count in (clusters or {}).items():
            if site not in SITES:
                raise InputError(f"clusters: {site}: one of {named} is needed; correct it")
            _check_count(f"clusters: {site}", count, MOST_CLUSTERS, f"{USUAL[site]} is usual")
        _check_count("multiple", multiple, 1024, "1 leaves clusters as they are, 16 and 32 suit matrix units")
        _check_count("restarts", restarts, 1000, "10 is usual")
        self.sites = tuple(sites)
        self.clusters: dict[str, int] = {**USUAL, **(clusters or {})}
        self.multiple = multiple
        self.restarts = restarts

    def applies(self, weight: IntScheme, activation: ActivationScheme) -> bool:
        return activation.quantised or activation.cache_bits < UNQUANTISED

    def gathered_norms(self, layout: BlockLayout) -> frozenset[str]:
        norms = {site.name: site.norm for site in layout.norms}
        wanted = [site for site in self.sites if site in NORMED]
        for site in wanted:
            if site not in norms:
                raise InputError(
                    f"Permute: sites: {site}: the output of this model's norms is the residual as well, which can't be "
                    "sorted; use sites: [qkt, out, fc2]"
                )
        return frozenset(norms[site] for site in wanted)

    def site_clusters(self) -> dict[str, int]:
        counts = {site: self.clusters[site] for site in self.sites}
        heads = {"q": counts.get("qkt", 1), "k": counts.get("qkt", 1), "v": counts.get("out", 1)}
        return {**{site: count for site, count in counts.items() if site != "qkt"}, **heads}

    def for_block(self, facts: BlockFacts) -> TransformState:
        if facts.sites is None:  # what is stored of a finished block is in its order already
            return PermuteBlock(facts.layout, facts.weights, {})
        return PermuteBlock(
            facts.layout, facts.weights, {site: self._labels(self._points(site, facts), site) for site in self.sites}
        )

    def _labels(self, points: Tensor, site: Site) -> Tensor:
        labels = cluster_labels(points, min(self.clusters[site], points.shape[1]), self.restarts)
        return labels if self.multiple == 1 else with_even_sizes(labels, self.multiple)

    def _points(self, site: Site, facts: BlockFacts) -> Tensor:
        """Largest and smallest value of each channel, over the heads of a group: [heads of keys or 1, channels, 2 or 4]
        with those of queries and keys together for `qkt` (RPTQ section 3.3)."""
        assert facts.sites is not None
        heads = facts.layout.attention
        if site == "qkt":
            (q_high, q_low), (k_high, k_low) = (facts.sites[name].ends for name in "qk")
            q_high, q_low = _by_group(q_high, heads).amax(1), _by_group(q_low, heads).amin(1)
            return torch.stack([q_high, k_high, q_low, k_low], dim=-1)
        high, low = facts.sites[site].ends
        if site == "out":
            high, low = _by_group(high, heads).amax(1), _by_group(low, heads).amin(1)
        return torch.stack([high, low], dim=-1)


class PermuteBlock(TransformState):
    """The orders of one block. Nothing is learned.

    Args:
        layout: Of the block.
        weights: Its own, for their shapes.
        labels: The cluster of each channel by site, [rows, channels], rows being heads of keys and values, or 1.
    """

    lr = 0.0

    def __init__(self, layout: BlockLayout, weights: Weights, labels: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._attention = layout.attention
        self._sorted = {site: site != "qkt" or _sorts_queries(layout.attention) for site in labels}
        for site, found in labels.items():
            self.register_buffer(f"labels/{site}", found, persistent=False)
        orders = {site: channel_order(found) for site, found in labels.items() if self._sorted[site]}
        self._norms = {site.norm: site.name for site in layout.norms if site.name in orders}
        for site in NORMED:
            if site in orders:
                self.register_buffer(f"order/{site}", orders[site][0], persistent=False)
        rows, columns = _moved(layout, orders, {n: weights[f"{n}.weight"].shape[0] for n in layout.names})
        self._rows, self._columns = tuple(rows), tuple(columns)
        for kind, indices in (("rows", rows), ("columns", columns)):
            for name, index in indices.items():
                self.register_buffer(_buffer(kind, name), index, persistent=False)

    def _index(self, kind: str, name: str) -> Tensor:
        return self.get_buffer(_buffer(kind, name))

    @property
    def labels(self) -> dict[str, Tensor]:
        heads, found = self._attention, {}
        for site, is_sorted in self._sorted.items():
            labels = self._index("labels", site)
            labels = labels.sort(1).values if is_sorted else labels
            by_query = labels.repeat_interleave(heads.heads // heads.kv_heads, 0)
            if site == "qkt":
                found |= {"q": by_query, "k": labels}
            elif site == "out":
                found |= {"out": by_query, "v": labels}
            else:
                found[site] = labels
        return found

    def after(self, facts: BlockFacts) -> BlockFacts:
        ranges = dict(facts.ranges)
        for name in self._columns:
            if name in ranges:
                ranges[name] = ranges[name].taken(self._index("columns", name))
        return replace(facts, weights=self(facts.weights), ranges=ranges)

    def forward(self, weights: Weights) -> Weights:
        made = dict(weights)
        for name in self._rows:
            index, bias = self._index("rows", name), f"{name}.bias"
            made[f"{name}.weight"] = made[f"{name}.weight"][index]
            if bias in made:
                made[bias] = made[bias][index]
        for name in self._columns:
            made[f"{name}.weight"] = made[f"{name}.weight"][:, self._index("columns", name)]
        for norm, site in self._norms.items():
            order = self._index("order", site)
            for name in (f"{norm}.weight", f"{norm}.norm.weight", f"{norm}.bias"):
                if name in made:
                    made[name] = made[name][order]
            made[f"{norm}.order"] = order.to(torch.int32)
        return made


def _moved(
    layout: BlockLayout, orders: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which row, and which column, comes where in each matrix that is sorted. `sizes`: rows of each matrix."""
    heads = layout.attention
    group = heads.heads // heads.kv_heads
    qkv, _, fc1, fc2 = layout.linears
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}

    def sort_rows(part: Rows, order: Tensor) -> None:
        index = rows.setdefault(part.linear, torch.arange(sizes[part.linear], device=order.device))
        index[part.start : part.start + len(order)] = part.start + order

    for site, order in orders.items():
        if site == "qkv":
            columns |= dict.fromkeys(qkv, order[0])
        elif site == "fc1":
            columns |= dict.fromkeys(fc1, order[0])
        elif site == "qkt":
            sort_rows(heads.q, _in_heads(order.repeat_interleave(group, 0)))
            sort_rows(heads.k, _in_heads(order))
        elif site == "out":
            sort_rows(heads.v, _in_heads(order))
            columns[heads.o] = _in_heads(order.repeat_interleave(group, 0))
        else:
            columns |= dict.fromkeys(fc2, order[0])
            for name in fc1:  # a gate and what it multiplies, in one matrix or in two
                for start in range(0, sizes[name], order.shape[1]):
                    sort_rows(Rows(name, start), order[0])
    return rows, columns


def _in_heads(order: Tensor) -> Tensor:
    """[heads, size] within each head to [heads * size] of all."""
    heads, size = order.shape
    return (order + torch.arange(heads, device=order.device)[:, None] * size).flatten()


def _by_group(x: Tensor, heads: AttentionSites) -> Tensor:
    """[query heads, size] to [kv, group, size]."""
    return x.unflatten(0, (heads.kv_heads, -1))


def _sorts_queries(heads: AttentionSites) -> bool:
    """Whether nothing stands between the projections and the attention that knows channels by their place."""
    return heads.rotary == 0 and heads.head_norms is None


def _buffer(kind: str, name: str) -> str:
    return f"{kind}/{name.replace('.', '/')}"


def _check_count(name: str, count: object, most: int, remedy: str) -> None:
    if type(count) is not int or not 1 <= count <= most:
        raise InputError(f"{name}={count}: a whole number from 1 to {most} is needed; {remedy}")

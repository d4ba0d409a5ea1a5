"""K-means against loops and against every partition; what is the same on every run; few points; even sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ptql.functional.clustering import (
    channel_order,
    cluster_labels,
    numbered,
    settled,
    spread_centres,
    with_even_sizes,
)


def some_points(heads: int, channels: int, features: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(heads, channels, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_draws(clusters: int, heads: int, seed: int = 0) -> Tensor:
    return torch.rand(clusters, heads, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inertia_of(points: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the mean of each cluster, one point after the other."""
    total = 0.0
    for label in set(labels.tolist()):
        members = [points[i] for i in range(len(points)) if labels[i] == label]
        centre = sum(members) / len(members)
        total += sum(float(((point - centre) ** 2).sum()) for point in members)
    return total


def slow_lloyd(points: Tensor, centres: Tensor) -> tuple[list[int], float]:
    """One head: loops over points and centres until nothing changes."""
    places, labels = [centre.clone() for centre in centres], None
    while True:
        nearest = [min(range(len(places)), key=lambda k, p=p: float(((p - places[k]) ** 2).sum())) for p in points]
        if nearest == labels:
            return nearest, sum(float(((p - places[k]) ** 2).sum()) for p, k in zip(points, nearest, strict=True))
        labels = nearest
        for k in range(len(places)):
            members = [p for p, label in zip(points, labels, strict=True) if label == k]
            if members:
                places[k] = sum(members) / len(members)


@pytest.mark.parametrize("seed", range(4))
def test_moving_centres_against_loops(seed: int) -> None:
    points = some_points(3, 20, 4, seed)
    centres = spread_centres(points, some_draws(5, 3, seed))
    labels, inertia = settled(points, centres)
    for head in range(3):
        expected, distance = slow_lloyd(points[head], centres[head])
        assert labels[head].tolist() == expected
        assert inertia[head].item() == pytest.approx(distance)


def test_centres_that_lose_all_points_stay_and_are_no_cluster() -> None:
    points = torch.tensor([[[0.0], [1.0], [10.0]]], dtype=torch.float64)
    labels, inertia = settled(points, torch.tensor([[[0.0], [100.0], [10.0]]], dtype=torch.float64))
    assert labels.tolist() == [[0, 0, 2]]
    assert inertia.item() == pytest.approx(0.5)
    assert numbered(points, labels, 3).tolist() == [[0, 0, 1]]


def test_beginnings_are_distinct_points() -> None:
    points = some_points(4, 9)
    chosen = spread_centres(points, some_draws(9, 4))
    for head in range(4):
        assert {tuple(c) for c in chosen[head].tolist()} == {tuple(p) for p in points[head].tolist()}


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_all_partitions_is_found(seed: int) -> None:
    points = some_points(1, 8, 2, seed)
    least = min(inertia_of(points[0], torch.tensor(labels)) for labels in itertools.product(range(3), repeat=8))
    assert inertia_of(points[0], cluster_labels(points, 3)[0]) == pytest.approx(least)


def test_the_same_on_every_run_and_no_random_number_is_drawn() -> None:
    points = some_points(3, 64)
    before = torch.get_rng_state()
    first = cluster_labels(points, 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, cluster_labels(points, 6))
    assert torch.equal(first, cluster_labels(points.float().double(), 6))
    # a head does not depend on those beside it as long as it has the same beginnings
    assert torch.equal(first[:1], cluster_labels(points[:1].expand(3, -1, -1), 6)[:1])


def test_more_beginnings_lose_no_more() -> None:
    points = some_points(1, 60, 2, 3)
    losses = [inertia_of(points[0], cluster_labels(points, 8, restarts)[0]) for restarts in (1, 3, 10, 20)]
    assert losses == sorted(losses, reverse=True)


def test_clusters_are_numbered_by_their_centres_without_gaps() -> None:
    points = some_points(2, 50)
    labels = cluster_labels(points, 7)
    for head in range(2):
        assert set(labels[head].tolist()) == set(range(7))
        centres = [points[head][labels[head] == k, 0].mean().item() for k in range(7)]
        assert centres == sorted(centres)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_distinct_points_than_clusters(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 3.0, 0.0, 7.0, 3.0, 0.0], dtype=dtype)
    points = torch.stack([torch.stack([values, -values], 1), torch.zeros(6, 2, dtype=dtype)])
    assert cluster_labels(points, 5).tolist() == [[0, 1, 0, 2, 1, 0], [0] * 6]
    assert cluster_labels(points, 1).tolist() == [[0] * 6] * 2
    assert cluster_labels(points[:, :1], 4).tolist() == [[0], [0]]


def test_an_outlier_has_a_cluster_of_its_own() -> None:
    points = some_points(1, 30)
    points[0, 11] = 1e4
    labels = cluster_labels(points, 4)
    assert (labels == labels[0, 11]).sum() == 1


@pytest.mark.parametrize("multiple", [4, 16, 32])
def test_even_sizes_move_borders_to_the_nearest_multiple(multiple: int) -> None:
    labels = cluster_labels(some_points(2, 150), 6)
    moved = with_even_sizes(labels, multiple)
    for head in range(2):
        order = channel_order(labels)[head]
        assert (moved[head, order].diff() >= 0).all()  # only the borders move
        sizes = moved[head].bincount()
        assert (sizes > 0).all()
        assert (sizes[:-1] % multiple == 0).all()
        borders, expected = 0, set()
        for size in labels[head].bincount().tolist()[:-1]:
            borders += size
            nearest = round(borders / multiple + 1e-9) * multiple
            expected |= {nearest} if 0 < nearest < 150 else set()
        assert set(sizes.cumsum(0)[:-1].tolist()) == expected


def test_even_sizes_of_less_than_one_multiple_are_one_cluster() -> None:
    assert with_even_sizes(torch.tensor([[0, 1, 2, 1, 0]]), 16).tolist() == [[0] * 5]
    assert with_even_sizes(torch.tensor([[0, 1, 2, 1, 0]]), 1).tolist() == [[0, 1, 2, 1, 0]]


def test_the_order_is_stable() -> None:
    assert channel_order(torch.tensor([[1, 0, 1, 0, 2], [0, 0, 0, 0, 0]])).tolist() == [
        [1, 3, 0, 2, 4],
        [0, 1, 2, 3, 4],
    ]

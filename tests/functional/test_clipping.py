"""The search for a share of the range, against a loop over groups and shares."""

from __future__ import annotations

import pytest
import torch

from ptql.functional import affine
from ptql.functional.clipping import SHARES, best_share, best_share_of_clusters


@pytest.mark.parametrize(("levels", "symmetric"), [(2, False), (3, True), (4, False), (4, True), (5, True), (8, False)])
def test_the_best_share_is_the_best_of_all(levels: int, symmetric: bool) -> None:
    """Number by number in float64."""
    torch.manual_seed(0)
    groups = torch.randn(5, 3, 16, dtype=torch.float64) ** 3
    found = best_share(groups, levels, symmetric)
    for i in range(5):
        for g in range(3):
            group = groups[i, g].tolist()
            errors = [error_of(group, share, levels, symmetric) for share in SHARES]
            assert errors[SHARES.index(found[i, g].item())] == pytest.approx(min(errors), rel=1e-12)


@pytest.mark.parametrize(("levels", "symmetric"), [(4, False), (5, True)])
def test_columns_count_by_their_importance(levels: int, symmetric: bool) -> None:
    torch.manual_seed(5)
    groups, importance = torch.randn(5, 3, 16, dtype=torch.float64) ** 3, torch.rand(3, 16, dtype=torch.float64) ** 4
    found = best_share(groups, levels, symmetric, importance)
    for i in range(5):
        for g in range(3):
            given = groups[i, g].tolist(), importance[g].tolist()
            errors = [error_of(given[0], share, levels, symmetric, given[1]) for share in SHARES]
            assert errors[SHARES.index(found[i, g].item())] == pytest.approx(min(errors), rel=1e-12)
    plain = best_share(groups, levels, symmetric)
    assert torch.equal(best_share(groups, levels, symmetric, torch.full_like(importance, 0.3)), plain)
    assert not torch.equal(found, plain)


def error_of(
    group: list[float], share: float, levels: int, symmetric: bool, importance: list[float] | None = None
) -> float:
    low, high = min(*group, 0) * share, max(*group, 0) * share
    if symmetric:
        scale, zero = max(-low, high) / ((levels - 1) // 2), levels // 2
    else:
        scale = (high - low) / (levels - 1)
        zero = min(max(round(-low / scale), 0), levels - 1)
    codes = [min(max(round(w / scale) + zero, 0), levels - 1) for w in group]
    counts = importance or [1.0] * len(group)
    return sum(k * ((c - zero) * scale - w) ** 2 for k, c, w in zip(counts, codes, group, strict=True))


def test_fewer_levels_clip_more_and_256_hardly() -> None:
    torch.manual_seed(1)
    groups = torch.randn(64, 1, 256)
    found = [best_share(groups, levels, False) for levels in (2, 4, 8, 16, 256)]
    means = [shares.mean().item() for shares in found]
    assert means == sorted(means)
    assert means[1] < 0.65
    assert means[-1] > 0.9
    assert all(shares.min() > SHARES[0] for shares in found)  # none would rather have less


def test_three_levels_begin_where_theory_has_them() -> None:
    """A step of 1.22 standard deviations is best for a normal distribution (Max 1960), a third of a row's range."""
    torch.manual_seed(3)
    groups = torch.randn(64, 1, 1024)
    found = best_share(groups, 3, True)
    step = found * groups.abs().amax(-1)
    assert step.mean().item() == pytest.approx(1.22, abs=0.03)
    assert SHARES[2] < found.min() < found.max() < 0.5


def test_a_short_group_is_not_disturbed_by_what_fills_it_up_and_zeros_are_not_clipped() -> None:
    torch.manual_seed(2)
    w = torch.randn(5, 11, dtype=torch.float64)
    assert torch.equal(best_share(affine.grouped(w, 8), 4, False)[:, 1], best_share(w[:, None, 8:], 4, False)[:, 0])
    assert (best_share(torch.zeros(2, 1, 4), 4, False) == SHARES[-1]).all()


@pytest.mark.parametrize(("levels", "symmetric"), [(4, False), (5, True), (16, False)])
def test_a_cluster_has_the_best_share_of_its_columns(levels: int, symmetric: bool) -> None:
    torch.manual_seed(4)
    w, cluster = torch.randn(5, 20, dtype=torch.float64) ** 3, torch.randint(0, 3, (20,))
    found = best_share_of_clusters(w, cluster, 4, levels, symmetric)
    for c in range(3):
        for i in range(5):
            own = w[i, cluster == c].tolist()
            errors = [error_of(own, share, levels, symmetric) for share in SHARES]
            assert errors[SHARES.index(found[i, c].item())] == pytest.approx(min(errors), rel=1e-12)
    assert (found[:, 3] == SHARES[-1]).all()  # of no columns

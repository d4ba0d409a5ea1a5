"""The search for a share of the range, against a loop over groups and shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.functional import affine
from ptql.functional.clipping import SHARES, best_share, round_clipped

CASES = [(levels, columns, symmetric) for levels in (4, 8, 16) for columns in (5, 8, 16) for symmetric in (False, True)]


def loop(w: Tensor, importance: Tensor, levels: int, columns: int, symmetric: bool) -> Tensor:
    rounded = w.clone()
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], columns):
            x, weight = w[row, start : start + columns], importance[start : start + columns]
            low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
            tried = []
            for share in (1.0, *reversed(SHARES)):
                ends = (torch.tensor([[low * share]]).double(), torch.tensor([[high * share]]).double())
                y = affine.fake_quantize(x[None], *affine.scale_and_zero(*ends, levels, symmetric), levels)[0]
                tried.append((float((weight * (y - x) ** 2).sum()), y))
            rounded[row, start : start + columns] = min(tried, key=lambda pair: pair[0])[1]
    return rounded


@pytest.mark.parametrize(("levels", "columns", "symmetric"), CASES)
def test_the_search_against_loops(levels: int, columns: int, symmetric: bool) -> None:
    torch.manual_seed(levels + columns)
    w = torch.randn(4, 16, dtype=torch.float64)
    w[0] *= 0  # a dead row
    importance = torch.rand(16, dtype=torch.float64)
    found = round_clipped(w, importance, levels, columns, symmetric)
    torch.testing.assert_close(found, loop(w, importance, levels, columns, symmetric))


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_it_never_loses_more_than_the_whole_range(levels: int) -> None:
    torch.manual_seed(levels)
    w, importance = torch.randn(8, 32) ** 3, torch.rand(32)
    low, high = affine.weight_range(affine.grouped(w, 32))
    whole = affine.fake_quantize(w[:, None], *affine.scale_and_zero(low, high, levels, False), levels)[:, 0]
    found = round_clipped(w, importance, levels, 32, False)
    by_row = [((x - w).square() * importance).sum(1) for x in (found, whole)]
    assert (by_row[0] <= by_row[1]).all()
    assert (by_row[0] < by_row[1]).any()


def test_what_has_no_importance_is_clipped_away() -> None:
    w, importance = torch.tensor([[1.0, 2.0, 3.0, 10.0]]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert torch.equal(round_clipped(w, importance, 8, 4, False)[0, :3], w[0, :3])  # seven steps of 1
    assert not torch.equal(round_clipped(w, torch.ones(4), 8, 4, False)[0, :3], w[0, :3])


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("levels", "symmetric"), [(2, False), (4, False), (4, True), (5, True), (8, False)])
def test_the_best_share_is_the_best_of_all(levels: int, symmetric: bool, weighed: bool) -> None:
    """Number by number in float64."""
    torch.manual_seed(0)
    groups = torch.randn(5, 3, 16, dtype=torch.float64) ** 3
    importance = torch.rand(1, 3, 16, dtype=torch.float64)
    found = best_share(groups, levels, symmetric, importance if weighed else None)
    for i in range(5):
        for g in range(3):
            group, weights = groups[i, g].tolist(), importance[0, g].tolist() if weighed else [1.0] * 16
            errors = [error_of(group, share, levels, symmetric, weights) for share in SHARES]
            assert errors[SHARES.index(found[i, g].item())] == pytest.approx(min(errors), rel=1e-12)


def error_of(group: list[float], share: float, levels: int, symmetric: bool, weights: list[float]) -> float:
    low, high = min(*group, 0) * share, max(*group, 0) * share
    if symmetric:
        scale, zero = max(-low, high) / ((levels - 1) // 2), levels // 2
    else:
        scale = (high - low) / (levels - 1)
        zero = min(max(round(-low / scale), 0), levels - 1)
    codes = [min(max(round(w / scale) + zero, 0), levels - 1) for w in group]
    return sum(weight * ((c - zero) * scale - w) ** 2 for weight, c, w in zip(weights, codes, group, strict=True))


def test_fewer_levels_clip_more_and_256_hardly() -> None:
    torch.manual_seed(1)
    groups = torch.randn(64, 1, 256)
    found = [best_share(groups, levels, False) for levels in (2, 4, 8, 16, 256)]
    means = [shares.mean().item() for shares in found]
    assert means == sorted(means)
    assert means[1] < 0.65
    assert means[-1] > 0.9
    assert all(shares.min() > SHARES[0] for shares in found)  # none would rather have less


def test_a_short_group_is_not_disturbed_by_what_fills_it_up_and_zeros_are_not_clipped() -> None:
    torch.manual_seed(2)
    w = torch.randn(5, 11, dtype=torch.float64)
    assert torch.equal(best_share(affine.grouped(w, 8), 4, False)[:, 1], best_share(w[:, None, 8:], 4, False)[:, 0])
    assert (best_share(torch.zeros(2, 1, 4), 4, False) == SHARES[-1]).all()

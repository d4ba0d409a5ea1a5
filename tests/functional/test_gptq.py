"""GPTQ against optimal brain quantisation by hand: a column at a time, the inverse updated in plain sight, float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.functional import affine, cluster_scales, gptq

SHAPES = [(40, 16), (48, 48), (300, 64), (7, 3), (20, 128)]  # row, columns of a group; a short last group in three
GRIDS = [(2, False), (3, True), (4, False), (4, True), (5, True), (8, False), (16, False), (16, True), (256, False)]


def some_weights(row: int, rows: int = 6) -> Tensor:
    torch.manual_seed(row)
    w = torch.randn(rows, row, dtype=torch.float64) * 0.1
    w[0] = w[0].abs() + 0.1  # a row of one sign
    w[1] = 0
    return w


def some_moments(row: int, tokens: int = 2000) -> Tensor:
    """Of inputs with a few directions in common, and channels of very different size."""
    torch.manual_seed(row + 1)
    common = torch.randn(tokens, 3, dtype=torch.float64) @ torch.randn(3, row, dtype=torch.float64)
    x = (common + torch.randn(tokens, row, dtype=torch.float64)) * torch.logspace(-1, 1, row, dtype=torch.float64)
    return 2 / tokens * x.t() @ x


def ranges(w: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    low, high = affine.weight_range(affine.grouped(w, columns))
    return 0.9 * low, 0.9 * high  # clipped


def by_hand(
    w: Tensor,
    moments: Tensor,
    grid: tuple[Tensor, Tensor],
    levels: int,
    columns: int | list[int],
    order: list[int],
    gain: Tensor | None = None,
) -> Tensor:
    """Codes [out, in]: each weight in turn is rounded, and the others of its row move by the inverse's row."""
    row, (scale, zero) = w.shape[1], grid
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(row, dtype=w.dtype)
    group = [j // columns for j in range(row)] if isinstance(columns, int) else columns
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for i in range(len(w)):
        left, inverse = w[i].clone(), torch.linalg.inv(damped)
        for j in order:
            step, middle = scale[i, group[j], 0].item(), zero[i, group[j], 0].item()
            step *= 1.0 if gain is None else gain[i, j].item()
            code = min(max(round(left[j].item() / step) + middle, 0), levels - 1)
            codes[i, j] = int(code)
            error = (left[j] - (code - middle) * step) / inverse[j, j]
            left -= error * inverse[j]
            inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("row", "columns"), SHAPES)
@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_codes_are_those_of_optimal_brain_quantisation(
    levels: int, symmetric: bool, row: int, columns: int, act_order: bool
) -> None:
    if row == 300 and levels not in (4, 5, 16):
        pytest.skip("three of them are enough for several blocks of columns")
    w, moments = some_weights(row), some_moments(row)
    columns = min(columns, row)
    low, high = ranges(w, columns)
    codes, scale, zero = gptq.encode(w, moments, low, high, levels, columns, symmetric, act_order=act_order)
    sizes = moments.diagonal().tolist()
    order = sorted(range(row), key=lambda j: -sizes[j]) if act_order else list(range(row))
    grid = affine.stored_grid(low, high, levels, symmetric)
    assert torch.equal(codes, by_hand(w, moments, grid, levels, columns, order))
    nearest, same_scale, same_zero = affine.encode(w, low, high, levels, columns, symmetric)
    assert torch.equal(scale, same_scale)
    assert zero is None if symmetric else torch.equal(zero, same_zero)
    assert row < 40 or levels == 2 or not torch.equal(codes, nearest)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("levels", "symmetric"), [(4, False), (5, True), (16, False)])
def test_groups_may_be_of_any_columns_and_any_size(levels: int, symmetric: bool, act_order: bool) -> None:
    w, moments = some_weights(40), some_moments(40)
    torch.manual_seed(5)
    cluster = torch.multinomial(torch.tensor([0.7, 0.05, 0.05, 0.2]), 40, replacement=True)
    low, high = (0.9 * end for end in cluster_scales.weight_range(w, cluster, 5))
    codes, scale, zero = gptq.encode(w, moments, low, high, levels, cluster, symmetric, act_order=act_order)
    order = moments.diagonal().argsort(descending=True).tolist() if act_order else list(range(40))
    grid = affine.stored_grid(low, high, levels, symmetric)
    assert torch.equal(codes, by_hand(w, moments, grid, levels, cluster.tolist(), order))
    nearest, same_scale, same_zero = cluster_scales.encode(w, low, high, levels, cluster, symmetric)
    assert torch.equal(scale, same_scale)
    assert zero is None if symmetric else torch.equal(zero, same_zero)
    assert levels < 16 or not torch.equal(codes, nearest)
    same = gptq.encode(w, moments, *ranges(w, 16), levels, torch.arange(40) // 16, symmetric, act_order=act_order)
    neighbours = gptq.encode(w, moments, *ranges(w, 16), levels, 16, symmetric, act_order=act_order)
    assert torch.equal(same[0], neighbours[0])


def test_columns_to_come_are_the_best_for_what_was_lost_before_them() -> None:
    """Without any recursion: least squares for all that is left, anew for every column."""
    w, moments, levels, columns = some_weights(40), some_moments(40), 4, 16
    low, high = ranges(w, columns)
    codes, scale, zero = gptq.encode(w, moments, low, high, levels, columns, False)
    rounded = affine.dequantize(codes, scale, zero, levels, columns).double()
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(40, dtype=w.dtype)
    for j in range(40):
        lost = (w - rounded)[:, :j]
        moved = w[:, j:] + torch.linalg.solve(damped[j:, j:], damped[j:, :j] @ lost.t()).t()
        ends = (scale * (0 - zero.float()), scale * (levels - 1 - zero.float()))
        group = j // columns
        inside = moved[:, 0].clamp(*(end[:, group].double() for end in ends))
        assert ((inside - rounded[:, j]).abs() <= 0.5001 * scale[:, group].double()).all()


@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_inputs_without_correlation_leave_rounding_to_nearest(levels: int, symmetric: bool) -> None:
    w = some_weights(48).float()
    given = (*ranges(w, 16), levels, 16, symmetric)
    for act_order in (False, True):
        found = gptq.encode(w, torch.rand(48).diag(), *given, act_order=act_order)
        assert torch.equal(found[0], affine.encode(w, *given)[0])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("levels", [4, 5, 8, 16])
def test_outputs_are_nearer_than_with_rounding_to_nearest(levels: int, act_order: bool) -> None:
    w, moments = some_weights(300).float(), some_moments(300).float()
    given = (*ranges(w, 64), levels, 64, levels == 5)
    nearest = error(w, moments, affine.encode(w, *given), levels)
    found = error(w, moments, gptq.encode(w, moments, *given, act_order=act_order), levels)
    assert found < (0.5 if act_order else 0.8) * nearest


def error(w: Tensor, moments: Tensor, stored: tuple[Tensor, Tensor, Tensor | None], levels: int) -> float:
    """Squared error of the outputs."""
    lost = (affine.dequantize(*stored, levels, 64) - w).double()
    return (lost @ moments.double() * lost).sum().item()


def test_float32_gives_the_codes_of_float64() -> None:
    w, moments = some_weights(300), some_moments(300)
    wide, _, _ = gptq.encode(w, moments, *ranges(w, 64), 8, 64, False)
    narrow, _, _ = gptq.encode(w.float(), moments.float(), *ranges(w.float(), 64), 8, 64, False)
    assert (wide == narrow).double().mean() > 0.98  # one code that tips moves those behind it


def test_what_is_given_stays_as_it_is() -> None:
    w, moments = some_weights(48), some_moments(48)
    kept = w.clone(), moments.clone()
    gptq.encode(w, moments, *ranges(w, 16), 4, 16, False, act_order=True)
    assert torch.equal(w, kept[0])
    assert torch.equal(moments, kept[1])


# Factors


@pytest.mark.parametrize("act_order", [False, True])
def test_what_multiplies_the_decoded_weights_belongs_to_the_grid(act_order: bool) -> None:
    w, moments = some_weights(40), some_moments(40)
    gain = 1 + 0.3 * torch.randn_like(w)
    gain[2] = -gain[2]
    low, high = ranges(w, 16)
    codes, _, _ = gptq.encode(w, moments, low, high, 8, 16, False, act_order=act_order, gain=gain)
    order = moments.diagonal().argsort(descending=True).tolist() if act_order else list(range(40))
    assert torch.equal(codes, by_hand(w, moments, affine.stored_grid(low, high, 8, False), 8, 16, order, gain))
    ones, _, _ = gptq.encode(w, moments, low, high, 8, 16, False, gain=torch.ones_like(w))
    assert torch.equal(ones, gptq.encode(w, moments, low, high, 8, 16, False)[0])


def test_a_factor_of_zero_leaves_a_code_and_the_others_make_up_for_it() -> None:
    w, moments = some_weights(40), some_moments(40)
    gain = torch.ones_like(w)
    gain[:, ::7] = 0
    codes, scale, zero = gptq.encode(w, moments, *ranges(w, 40), 16, 40, False, gain=gain)
    lost = affine.dequantize(codes, scale, zero, 16, 40).double() * gain - w
    nothing = torch.where(gain == 0, -w, 0)  # what cannot be kept, if nobody made up for it
    assert (lost @ moments * lost).sum() < 0.8 * (nothing @ moments * nothing).sum()


# Moments that are not what they should be


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    moments = some_moments(48)
    factor = gptq.inverse_factor(moments, 0.01, raised=lambda enough: pytest.fail(f"{enough} is no raised damping"))
    assert torch.equal(factor, factor.triu())
    damped = moments / moments.diagonal().mean() + 0.01 * torch.eye(48, dtype=torch.float64)
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 10])
def test_fewer_tokens_than_columns_are_enough(tokens: int) -> None:
    w, moments = some_weights(300).float(), some_moments(300, tokens).float()
    given = (*ranges(w, 64), 8, 64, False)
    found, nearest = gptq.encode(w, moments, *given), affine.encode(w, *given)
    assert error(w, moments, found, 8) < 0.5 * error(w, moments, nearest, 8)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_dead_column_is_rounded_to_nearest_and_disturbs_none(act_order: bool) -> None:
    w, moments = some_weights(48), some_moments(48)
    dead = [0, 17, 47]
    moments[dead], moments[:, dead] = 0, 0
    given = (*ranges(w, 48), 8, 48, False)
    codes, _, _ = gptq.encode(w, moments, *given, act_order=act_order)
    assert torch.equal(codes[:, dead], affine.encode(w, *given)[0][:, dead])
    alive = [j for j in range(48) if j not in dead]
    damping = 0.01 * len(alive) / 48  # the mean of the diagonal counts them
    fewer = gptq.encode(w[:, alive], moments[alive][:, alive], *ranges(w, 48), 8, 48, False, damping, act_order)
    assert torch.equal(codes[:, alive], fewer[0])


@pytest.mark.parametrize(("below", "damping"), [(0.02, 0.1), (0.5, 1.0), (30.0, 100.0)])
def test_damping_is_raised_until_there_is_a_factor(below: float, damping: float) -> None:
    """Moments that are below zero by so much of the diagonal's mean, as rounding may leave them."""
    values, directions = torch.linalg.eigh(some_moments(48))
    rest = values[1:].sum()
    values[0] = -below * rest / (48 + below)  # -below times the mean of all
    moments = directions * values @ directions.t()
    said: list[float | None] = []
    factor = gptq.inverse_factor(moments, 0.01, said.append)
    assert said == pytest.approx([damping])
    damped = moments / moments.diagonal().mean() + damping * torch.eye(48, dtype=torch.float64)
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(damped), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("act_order", [False, True])
def test_without_any_factor_all_is_rounded_to_nearest(value: float, act_order: bool) -> None:
    w, moments = some_weights(48).float(), torch.full((48, 48), value)
    given = (*ranges(w, 16), 8, 16, False)
    said: list[float | None] = []
    found = gptq.encode(w, moments, *given, act_order=act_order, raised=said.append)
    assert said == [None]
    for mine, theirs in zip(found, affine.encode(w, *given), strict=True):
        assert torch.equal(mine, theirs)


def test_one_number_that_is_none_does_not_spread() -> None:
    w, moments = some_weights(48).float(), some_moments(48).float()
    moments[3, 5] = float("nan")
    given = (*ranges(w, 16), 8, 16, False)
    assert torch.equal(gptq.encode(w, moments, *given)[0], affine.encode(w, *given)[0])


# Products


def test_products_add_up() -> None:
    x = torch.randn(50, 7, dtype=torch.float64)
    total = torch.zeros(7, 7, dtype=torch.float64)
    for part in x.split(16):
        gptq.add_products(total, part)
    torch.testing.assert_close(total, sum(torch.outer(token, token) for token in x))

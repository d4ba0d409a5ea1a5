"""Affine rounding against loops over elements and against plain autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptql.functional import affine

BITS = range(2, 9)
LEVELS = (2, 4, 5, 8, 16, 32, 64, 128, 256)
GRIDS = [(levels, symmetric) for levels in LEVELS for symmetric in (False, True) if (levels, symmetric) != (2, True)]


# The references. Python's round() and torch's both round halves to even.


def loop_round(x: list[float], scale: float, zero: float, levels: int) -> list[float]:
    """Each number to the nearest of the multiples of `scale`."""
    codes = [min(max(round(v / scale) + zero, 0), levels - 1) for v in x]
    return [(code - zero) * scale for code in codes]


def loop_scale_and_zero(low: float, high: float, levels: int, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        return max(-low, high) / ((levels - 1) // 2), levels // 2
    scale = (high - low) / (levels - 1)
    return scale, min(max(round(-low / scale), 0), levels - 1)


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def autograd_round(x: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    code = (straight_through(x / scale) + zero.detach()).clamp(0, levels - 1)
    return (code - zero.detach()) * scale


def autograd_round_tokens(x: Tensor, bits: int) -> Tensor:
    low, high = x.min(-1, keepdim=True).values, x.max(-1, keepdim=True).values
    scale = ((high - low) / (2**bits - 1)).clamp(affine.SMALLEST_SCALE, affine.LARGEST_SCALE)
    return autograd_round(x, scale, (-low / scale).round(), 2**bits)


def gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum, so that every element counts differently."""
    torch.manual_seed(99)
    return list(torch.autograd.grad((out * torch.randn(out.shape, dtype=torch.float64)).sum(), leaves))


def some_rows(levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors [2, 5, 12], some of whose elements are clamped below and above, one exactly at a bound."""
    torch.manual_seed(levels)
    x = torch.randn(2, 5, 12, dtype=torch.float64) * 2
    scale = (torch.rand(2, 5, 1, dtype=torch.float64) + 0.5) * 3 / levels
    zero = torch.randint(0, levels, (2, 5, 1)).double()
    x[0, 0, :2] = torch.stack([-zero[0, 0, 0] * scale[0, 0, 0], (levels - 1 - zero[0, 0, 0]) * scale[0, 0, 0]])
    return x, scale, zero


@pytest.mark.parametrize("levels", LEVELS)
def test_fake_quantize_is_a_loop_over_elements(levels: int) -> None:
    x, scale, zero = some_rows(levels)
    out = affine.fake_quantize(x, scale, zero, levels)
    for i in range(2):
        for j in range(5):
            expected = loop_round(x[i, j].tolist(), scale[i, j].item(), zero[i, j].item(), levels)
            assert out[i, j].tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    grid = out / scale + zero
    assert grid.min() > -1e-9
    assert grid.max() < levels - 1 + 1e-9
    narrow = affine.fake_quantize(x.float(), scale.float(), zero.float(), levels)
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize("levels", LEVELS)
def test_fake_quantize_has_the_straight_through_gradient(levels: int) -> None:
    x, scale, zero = some_rows(levels)
    leaves = [t.requires_grad_() for t in (x, scale)]
    ours = gradients(affine.fake_quantize(x, scale, zero, levels), *leaves)
    reference = gradients(autograd_round(x, scale, zero, levels), *leaves)
    assert 0 < (reference[0] == 0).sum() < x.numel()  # some elements are clamped, some are not
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_zero_points_get_no_gradient_and_neither_do_leaves_that_want_none() -> None:
    x, scale, zero = some_rows(4)
    zero.requires_grad_()
    x.requires_grad_()
    affine.fake_quantize(x, scale, zero, 4).sum().backward()
    assert zero.grad is None
    assert scale.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("bits", BITS)
def test_tokens_are_rounded_on_their_own_range(bits: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(2, 3, 4, 10, dtype=torch.float64) * torch.rand(2, 3, 4, 1, dtype=torch.float64) * 50
    x[0, 0] += 100  # zero lies outside of these tokens' range
    x[0, 1] -= 100
    out = affine.fake_quantize_tokens(x, bits)
    for token, rounded in zip(x.flatten(0, 2).tolist(), out.flatten(0, 2).tolist(), strict=True):
        scale = (max(token) - min(token)) / (2**bits - 1)
        expected = loop_round(token, scale, round(-min(token) / scale), 2**bits)
        assert rounded == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert max(abs(a - b) for a, b in zip(token, rounded, strict=True)) <= scale * (1 + 1e-9)


@pytest.mark.parametrize("bits", BITS)
def test_tokens_have_the_straight_through_gradient(bits: int) -> None:
    torch.manual_seed(bits)
    x = (torch.randn(2, 7, 3, 16, dtype=torch.float64) * 3).requires_grad_()
    heads = x.transpose(1, 2)  # as attention hands them over: not contiguous
    (ours,) = gradients(affine.fake_quantize_tokens(heads, bits), x)
    (reference,) = gradients(autograd_round_tokens(heads, bits), x)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_tokens_without_a_range_or_with_a_huge_one() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [3.0, 3.0, 3.0], [-1e6, 0.0, 1e6], [0.0, 1e-9, 2e-9]]).double()
    x.requires_grad_()
    out = affine.fake_quantize_tokens(x, 4)
    assert out[0].tolist() == [0, 0, 0]
    assert out[1].tolist() == pytest.approx([3, 3, 3], abs=1e-6)
    assert out.isfinite().all()
    (ours,), (reference,) = gradients(out, x), gradients(autograd_round_tokens(x, 4), x)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_equal_extremes_get_the_ranges_gradient_once() -> None:
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.3]], dtype=torch.float64, requires_grad=True)
    (grad,) = gradients(affine.fake_quantize_tokens(x, 2), x)
    (reference,) = gradients(autograd_round_tokens(x, 2), x)
    assert grad.sum().item() == pytest.approx(reference.sum().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_are_computed_in_float32_and_come_back_in_their_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 32) * 10).to(dtype)
    out = affine.fake_quantize_tokens(x, 8)
    assert out.dtype == dtype
    assert torch.equal(out, affine.fake_quantize_tokens(x.float(), 8).to(dtype))


def test_sixteen_bits_are_the_identity() -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert affine.fake_quantize_tokens(x, 16) is x


def test_one_token_does_not_touch_another() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    changed = x.clone()
    changed[3] *= 1000
    before, after = affine.fake_quantize_tokens(x, 4), affine.fake_quantize_tokens(changed, 4)
    kept = [0, 1, 2, 4, 5]
    assert torch.equal(before[kept], after[kept])


# Weights: groups, ranges, scales


@pytest.mark.parametrize(("row", "columns"), [(576, 128), (172, 32), (64, 64), (48, 16), (5, 7)])
def test_groups_are_slices_of_the_row(row: int, columns: int) -> None:
    torch.manual_seed(row)
    w = torch.randn(3, row) + 0.5
    groups = affine.grouped(w, columns)
    assert groups.shape == (3, -(-row // columns), columns)
    for k in range(groups.shape[1]):
        part = w[:, k * columns : (k + 1) * columns]
        assert torch.equal(groups[:, k, : part.shape[1]], part)
        assert (groups[:, k, part.shape[1] :] == 0).all()
    assert torch.equal(affine.ungrouped(groups, row), w)


@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize(("row", "columns"), [(576, 128), (172, 32)])
def test_the_short_last_groups_range_ignores_the_padding(row: int, columns: int, sign: int) -> None:
    torch.manual_seed(row)
    w = torch.randn(4, row, dtype=torch.float64)
    w = sign * (w.abs() + 1) if sign else w
    low, high = affine.weight_range(affine.grouped(w, columns))
    for i, line in enumerate(w.tolist()):
        for k, start in enumerate(range(0, row, columns)):
            part = line[start : start + columns]
            assert (low[i, k, 0].item(), high[i, k, 0].item()) == (min(*part, 0), max(*part, 0))
    if sign:  # a range of one sign still holds zero
        assert ((low == 0) if sign > 0 else (high == 0)).all()


def test_the_initial_share_is_omniquants() -> None:
    w = torch.randn(3, 2, 8, dtype=torch.float64)
    logits = torch.full((3, 2), 4.0, dtype=torch.float64)
    (low, high), (all_low, all_high) = affine.weight_range(w, logits, logits), affine.weight_range(w)
    share = 1 / (1 + math.exp(-4))
    assert share == pytest.approx(0.98201, abs=5e-6)
    torch.testing.assert_close(low, all_low * share)
    torch.testing.assert_close(high, all_high * share)


@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_scale_and_zero_point_are_the_definitions(levels: int, symmetric: bool) -> None:
    torch.manual_seed(levels)
    low, high = -torch.rand(20, 1, dtype=torch.float64), torch.rand(20, 1, dtype=torch.float64)
    low[0], high[1] = 0, 0
    scale, zero = affine.scale_and_zero(low, high, levels, symmetric)
    for i in range(20):
        expected = loop_scale_and_zero(low[i].item(), high[i].item(), levels, symmetric)
        assert (scale[i].item(), zero[i].item()) == pytest.approx(expected, rel=1e-12)
    if symmetric:
        assert (zero == levels // 2).all()
    assert (zero[0] == (levels // 2 if symmetric else 0)).all()


def test_a_group_of_zeros_has_a_scale_that_can_be_stored() -> None:
    nothing = torch.zeros(2, 1)
    for symmetric in (False, True):
        scale, _ = affine.scale_and_zero(nothing, nothing, 16, symmetric)
        assert (scale.half() > 0).all()
        w = torch.zeros(2, 8)
        codes, stored, zero = affine.encode(w, nothing[:, None], nothing[:, None], 16, 8, symmetric)
        assert torch.equal(affine.dequantize(codes, stored, zero, 16, 8), w)


def test_weights_beyond_what_a_scale_can_store_stay_finite() -> None:
    w = torch.tensor([[-1e7, 1e7, 1.0]])
    groups = affine.grouped(w, 3)
    low, high = affine.weight_range(groups)
    for symmetric in (False, True):
        scale, zero = affine.scale_and_zero(low, high, 4, symmetric)
        assert (scale == affine.LARGEST_SCALE).all()
        assert ((zero >= 0) & (zero <= 3)).all()  # a code still, though -low / scale is 1000
        assert affine.fake_quantize(groups, scale, zero, 4).isfinite().all()
        codes, stored, zeros = affine.encode(w, low, high, 4, 3, symmetric)
        assert affine.dequantize(codes, stored, zeros, 4, 3).isfinite().all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [4, 5, 8, 16, 256])
def test_clipping_logits_learn_through_the_scale_only(levels: int, symmetric: bool) -> None:
    torch.manual_seed(levels)
    w = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    lower = torch.randn(3, 3, dtype=torch.float64).add_(2).requires_grad_()
    upper = torch.randn(3, 3, dtype=torch.float64).add_(2).requires_grad_()
    leaves = (w, lower, upper)

    groups = affine.grouped(w, 8)
    scale, zero = affine.scale_and_zero(*affine.weight_range(groups, lower, upper), levels, symmetric)
    assert not zero.requires_grad
    ours = gradients(affine.ungrouped(affine.fake_quantize(groups, scale, zero, levels), 20), *leaves)

    parts = []
    for k, start in enumerate(range(0, 20, 8)):  # group by group, the last one of four columns
        part = w[:, start : start + 8]
        low = part.min(1, keepdim=True).values.clamp(max=0) * lower[:, k : k + 1].sigmoid()
        high = part.max(1, keepdim=True).values.clamp(min=0) * upper[:, k : k + 1].sigmoid()
        top = levels - 1
        if symmetric:
            step, middle = torch.maximum(-low, high) / ((levels - 1) // 2), torch.tensor(float(levels // 2))
        else:
            step = (high - low) / top
            middle = (-low / step).round().clamp(0, top)
        parts.append(autograd_round(part, step, middle, levels))
    reference = gradients(torch.cat(parts, 1), *leaves)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    moved = [(grad != 0).any().item() for grad in ours[1:]]
    assert moved == [True, True]


# Encoding


@pytest.mark.parametrize(("row", "columns"), [(64, 64), (172, 32), (576, 128)])
@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_what_is_stored_is_a_loop_over_elements(levels: int, row: int, columns: int, symmetric: bool) -> None:
    torch.manual_seed(levels + row)
    w = torch.randn(2, row, dtype=torch.float64)
    low, high = affine.weight_range(affine.grouped(w, columns))
    codes, scale, zero = affine.encode(w, low, high, levels, columns, symmetric)
    assert codes.shape == w.shape
    assert codes.max() <= levels - 1
    assert scale.dtype == torch.float16
    assert (zero is None) == symmetric
    if zero is not None:
        assert zero.max() <= levels - 1
    dense = affine.dequantize(codes, scale, zero, levels, columns)
    for i, line in enumerate(w.tolist()):
        for k, start in enumerate(range(0, row, columns)):
            part = line[start : start + columns]
            step, middle = loop_scale_and_zero(min(*part, 0), max(*part, 0), levels, symmetric)
            assert scale[i, k].item() == torch.tensor(step).half().item()
            step = scale[i, k].item()
            if not symmetric:
                middle = min(max(round(-min(*part, 0) / step), 0), levels - 1)
            expected = loop_round(part, step, middle, levels)
            assert dense[i, start : start + columns].tolist() == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_decoded_weights_are_the_fake_ones_where_float16_holds_the_scale(levels: int, symmetric: bool) -> None:
    torch.manual_seed(levels)
    w = torch.randn(4, 40) * 0.1
    step = (torch.rand(4, 3, 1) * 0.05 + 0.01).half().float()
    if symmetric:
        low, high = -step * ((levels - 1) // 2), step
    else:
        middle = torch.randint(0, levels, (4, 3, 1))
        low, high = -middle * step, (levels - 1 - middle) * step
    scale, zero = affine.scale_and_zero(low, high, levels, symmetric)
    torch.testing.assert_close(scale, step, rtol=1e-6, atol=0)
    fake = affine.ungrouped(affine.fake_quantize(affine.grouped(w, 16), step, zero, levels), 40)
    decoded = affine.dequantize(*affine.encode(w, low, high, levels, 16, symmetric), levels, 16)
    assert torch.equal(decoded, fake)


@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_encoding_what_was_decoded_changes_nothing(levels: int, symmetric: bool) -> None:
    torch.manual_seed(levels)
    w = torch.randn(4, 40)
    low, high = affine.weight_range(affine.grouped(w, 16))
    codes, scale, zero = affine.encode(w, low, high, levels, 16, symmetric)
    dense = affine.dequantize(codes, scale, zero, levels, 16)
    step = scale.float().unsqueeze(-1)
    middle = levels // 2 if zero is None else zero.unsqueeze(-1).float()
    again = affine.encode(
        dense,
        -step * ((levels - 1) // 2 if symmetric else middle),
        step * (levels - 1 - middle),
        levels,
        16,
        symmetric,
    )
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)


def test_rounding_to_float16_errs_by_half_a_step_at_most_inside_the_range() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 64)
    low, high = affine.weight_range(affine.grouped(w, 16))
    codes, scale, zero = affine.encode(w, low, high, 16, 16, False)
    error = affine.grouped(w - affine.dequantize(codes, scale, zero, 16, 16), 16).abs()
    # The ends of the range may lie half a step beyond the grid, as the zero point is rounded.
    assert (error <= scale.float().unsqueeze(-1) * 0.51).all()

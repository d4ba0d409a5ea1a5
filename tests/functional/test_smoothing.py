"""Initial scales by hand, and folds as equivalences in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptql.functional import smoothing

C = 12  # channels between producer and consumer


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def some_scale(c: int = C) -> Tensor:
    return torch.rand(c, dtype=torch.float64) * 4.8 + 0.2


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_lrquants_initial_scale() -> None:
    found = smoothing.log_activation_scale(torch.tensor([1.0, 10.0, 100.0])).tolist()
    assert [round(found[0], 2), round(found[1], 2), round(found[2], 1)] == [0.63, 2.79, 15.0]


def test_lrquants_initial_scale_is_its_formula_and_never_zero() -> None:
    absmax = torch.tensor([0.0, 1e-7, 1e-5, 0.3, 7.0, 1e4], dtype=torch.float64)
    expected = [max(max(a, 1e-5) / math.log2(2 + max(a, 1e-5)), 1e-5) for a in absmax.tolist()]
    assert smoothing.log_activation_scale(absmax).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_the_balanced_scale_is_its_formula_and_never_zero(alpha: float) -> None:
    absmax = torch.tensor([0.0, 0.3, 7.0, 1e-7, 50.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 0.2, 0.01, 100.0, 0.0], dtype=torch.float64)
    pairs = [(max(a, 1e-5), max(w, 1e-5)) for a, w in zip(absmax.tolist(), weight.tolist(), strict=True)]
    expected = [max(a**alpha / w ** (1 - alpha), 1e-5) for a, w in pairs]
    assert smoothing.balanced_scale(absmax, weight, alpha).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_layer_norm_and_its_consumer(shifted: bool) -> None:
    x, gain, offset = random(5, C), random(C), random(C)
    w, b = random(7, C), random(7)
    scale, shift = some_scale(), random(C) if shifted else None
    expected = F.linear(F.layer_norm(x, (C,), gain, offset), w, b)

    gain_2, offset_2 = smoothing.fold_into_norm(gain, offset, scale, shift)
    w_2, b_2 = smoothing.fold_into_consumer(w, b, scale, shift)
    normed = F.layer_norm(x, (C,), gain_2, offset_2)
    assert error(F.linear(normed, w_2, b_2), expected) < 1e-10
    moved = F.layer_norm(x, (C,), gain, offset) - (0 if shift is None else shift)
    assert error(normed, moved / scale) < 1e-10


@pytest.mark.parametrize("biased", [False, True])
def test_an_rms_norm_without_bias_and_its_consumer(biased: bool) -> None:
    x, gain, w, b, scale = random(5, C), random(C), random(7, C), random(7) if biased else None, some_scale()
    gain_2, none = smoothing.fold_into_norm(gain, None, scale, None)
    w_2, b_2 = smoothing.fold_into_consumer(w, b, scale, None)
    assert none is None
    assert b_2 is b
    expected = F.linear(F.rms_norm(x, (C,), gain), w, b)
    assert error(F.linear(F.rms_norm(x, (C,), gain_2), w_2, b_2), expected) < 1e-10


@pytest.mark.parametrize(("biased", "shifted"), [(False, False), (True, False), (True, True)])
def test_a_producer_and_its_consumer(biased: bool, shifted: bool) -> None:
    x, w, v = random(5, 9), random(C, 9), random(7, C)
    b, a = (random(C), random(7)) if biased else (None, None)
    scale, shift = some_scale(), random(C) if shifted else None
    expected = F.linear(F.linear(x, w, b), v, a)

    w_2, b_2 = smoothing.fold_into_producer(w, b, scale, shift)
    v_2, a_2 = smoothing.fold_into_consumer(v, a, scale, shift)
    assert error(F.linear(F.linear(x, w_2, b_2), v_2, a_2), expected) < 1e-10
    if not biased:
        assert (b_2, a_2) == (None, None)


def test_folds_leave_what_they_are_given_alone_and_are_differentiable() -> None:
    w, b = random(7, C), random(7)
    before = w.clone(), b.clone()
    scale, shift = some_scale().requires_grad_(), random(C).requires_grad_()
    w_2, b_2 = smoothing.fold_into_consumer(w, b, scale, shift)
    grads = torch.autograd.grad(w_2.sum() + b_2.sum(), (scale, shift))
    torch.testing.assert_close(grads[0], w.sum(0))
    torch.testing.assert_close(grads[1], w.sum(0))
    for fold, rows in ((smoothing.fold_into_producer, random(C, 9)), (smoothing.fold_into_norm, random(C))):
        fold(rows, random(C), scale, shift)
    assert torch.equal(w, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize(("kv_heads", "heads", "size"), [(1, 1, 4), (2, 2, 3), (2, 6, 4), (1, 5, 2)])
def test_heads_are_repeated_as_attention_reads_them(kv_heads: int, heads: int, size: int) -> None:
    x = random(kv_heads * size)
    by_head = x.view(kv_heads, size)
    expected = torch.cat([by_head[h // (heads // kv_heads)] for h in range(heads)])
    assert torch.equal(smoothing.repeat_heads(x, kv_heads, heads), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_kept_away_from_zero(dtype: torch.dtype) -> None:
    scale = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 0.00999, -0.00999, 0.01, -0.01, 0.5, -3.0], dtype=dtype)
    same = scale
    smoothing.keep_away_from_zero(scale)
    expected = [0.01, 0.01, 0.01, -0.01, 0.01, -0.01, 0.01, -0.01, 0.5, -3.0]
    torch.testing.assert_close(scale, torch.tensor(expected, dtype=dtype))
    assert same is scale
    smoothing.keep_away_from_zero(scale, smallest=1.0)
    assert scale.tolist() == [1, 1, 1, -1, 1, -1, 1, -1, 1, -3]

"""Packed weights against the weights that the encoder meant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptql.functional import affine
from ptql.nn.packed_linear import PackedLinear, dense_from_packed, packed_tensors
from ptql.parts.activations.dynamic import TokenRounding
from ptql.recipe import IntScheme

SCHEMES = [
    IntScheme(2, 16, symmetric=False),
    IntScheme(3, -1, symmetric=True),
    IntScheme(4, 32, symmetric=False),  # 32 divides neither 48 nor 37
    IntScheme(5, 7, symmetric=False),
    IntScheme(8, 20, symmetric=True),
    IntScheme(2, 16, symmetric=True, balanced=True),
    IntScheme(2, 5, balanced=True),
    IntScheme(1, 16),
    IntScheme(1, 16, symmetric=True, balanced=True),
    IntScheme(1, 5, balanced=True),
]


def encoded(w: Tensor, scheme: IntScheme) -> tuple[Tensor, Tensor, Tensor | None]:
    columns = scheme.columns(w.shape[1])
    low, high = affine.weight_range(affine.grouped(w, columns))
    return affine.encode(w, low, high, scheme.levels, columns, scheme.symmetric)


def by_loops(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: IntScheme) -> Tensor:
    """(code - zero) * scale, number by number, in float64."""
    weight = torch.zeros(codes.shape, dtype=torch.float64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            group = j // scheme.columns(codes.shape[1])
            middle = scheme.levels // 2 if zero is None else int(zero[i, group])
            weight[i, j] = (int(codes[i, j]) - middle) * float(scale[i, group])
    return weight


def filled(w: Tensor, scheme: IntScheme, bias: Tensor | None, bits: int | None = None) -> PackedLinear:
    rounding = None if bits is None else TokenRounding(bits)
    layer = PackedLinear(w.shape[1], w.shape[0], scheme, bias is not None, rounding)
    tensors = packed_tensors(*encoded(w, scheme), scheme.levels)
    layer.load_state_dict(tensors if bias is None else {**tensors, "bias": bias})
    return layer


@pytest.mark.parametrize("columns", [48, 37])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_stored_tensors_give_back_what_was_encoded(scheme: IntScheme, columns: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(6, columns)
    codes, scale, zero = encoded(w, scheme)
    tensors = packed_tensors(codes, scale, zero, scheme.levels)
    expected = by_loops(codes, scale, zero, scheme)
    assert torch.equal(dense_from_packed(tensors, columns, scheme).double(), expected)

    layer = PackedLinear(columns, 6, scheme, bias=False, rounding=None)
    assert {k: (v.shape, v.dtype) for k, v in layer.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in tensors.items()
    }
    layer.load_state_dict(tensors)
    assert torch.equal(layer.dense_weight().double(), expected)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_factors_multiply_what_the_codes_stand_for(scheme: IntScheme, rank: int) -> None:
    torch.manual_seed(3)
    w, left, right = torch.randn(6, 37), torch.randn(6, rank), torch.randn(rank, 37)
    codes, scale, zero = encoded(w, scheme)
    tensors = packed_tensors(codes, scale, zero, scheme.levels, (left, right))
    without = packed_tensors(codes, scale, zero, scheme.levels)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in without.items())
    assert {name: (tensors[name].shape, tensors[name].dtype) for name in tensors.keys() - without.keys()} == {
        "left": ((6, rank), torch.int16),
        "right": ((rank, 37), torch.int16),
    }
    expected = by_loops(codes, scale, zero, scheme)
    for i in range(6):
        for j in range(37):
            expected[i, j] *= sum(float(left[i, k].half()) * float(right[k, j].half()) for k in range(rank))
    layer = PackedLinear(37, 6, scheme, bias=False, rounding=None, factor_rank=rank)
    assert layer.state_dict().keys() == tensors.keys()
    layer.load_state_dict(tensors)
    torch.testing.assert_close(layer.dense_weight().double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.dense_weight(), dense_from_packed(tensors, 37, scheme))
    before, x = layer.dense_weight(), torch.randn(3, 37)
    assert torch.equal(layer.to_dense()(x), layer(x))
    assert torch.equal(layer.to(torch.bfloat16).dense_weight(), before)


def test_factors_that_float16_does_not_hold_are_its_largest() -> None:
    w = torch.randn(2, 8)
    tensors = packed_tensors(*encoded(w, SCHEMES[0]), SCHEMES[0].levels, (torch.full((2, 1), -1e6), torch.ones(1, 8)))
    assert (tensors["left"].view(torch.float16) == -65504).all()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_rounding_then_the_dense_linear(bits: int | None, with_bias: bool) -> None:
    torch.manual_seed(1)
    w, x, bias = torch.randn(10, 48), torch.randn(2, 5, 48), torch.randn(10) if with_bias else None
    layer = filled(w, SCHEMES[0], bias, bits)
    rounded = x if bits is None else affine.fake_quantize_tokens(x, bits)
    expected = F.linear(rounded, layer.dense_weight(), bias)
    assert torch.equal(layer(x), expected)
    dense = layer.to_dense()
    assert torch.equal(dense(x), expected)
    assert dense.rounding is layer.rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_module_leaves_scales_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    layer = filled(torch.randn(10, 48), SCHEMES[2], torch.randn(10))
    before = layer.dense_weight()
    assert layer.to(dtype).bias.dtype == dtype
    assert torch.equal(layer.dense_weight(), before)
    x = torch.randn(3, 48, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, before.to(dtype), layer.bias))
    twin = layer.to_dense()
    assert (twin.weight.dtype, twin.bias.dtype) == (torch.float32, torch.float32)


def test_it_can_be_built_without_memory() -> None:
    layer = PackedLinear(48, 10, SCHEMES[2], True, None, device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.bias.dtype == torch.bfloat16


def test_nothing_in_it_is_trained() -> None:
    assert not any(p.requires_grad for p in filled(torch.randn(4, 16), SCHEMES[0], torch.zeros(4)).parameters())

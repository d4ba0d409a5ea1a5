"""Codes of a cache's vectors against loops in Python's own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.functional.affine import fake_quantize_tokens
from ptql.functional.static import decode_channels, encode_channels, fake_quantize_channels
from ptql.functional.token_codes import decode_tokens, encode_tokens, pack_tokens, unpack_tokens

WIDTHS = range(2, 9)


def half(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).half().double().item()


def reference(vector: list[float], bits: int) -> list[float]:
    """The values of one vector by the definition, its step as float16 holds it."""
    low, high = min(vector), max(vector)
    step = half(min(max((high - low) / (2**bits - 1), 1e-6), 1e4))
    zero = round(-low / step)
    return [(min(max(round(x / step) + zero, 0), 2**bits - 1) - zero) * step for x in vector]


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_against_loops(bits: int) -> None:
    x = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(bits))
    codes, scale, zero = encode_tokens(x, bits)
    assert int(codes.max()) < 2**bits
    found = decode_tokens(codes, scale, zero).flatten(0, -2)
    for vector, values in zip(x.flatten(0, -2).double().tolist(), found.tolist(), strict=True):
        # a number between two codes in float64 may be on the other side in float32
        slack = 2 * (max(vector) - min(vector)) / (2**bits - 1) * 1e-3
        assert values == pytest.approx(reference(vector, bits), abs=slack)


@pytest.mark.parametrize("bits", WIDTHS)
def test_almost_what_the_model_rounds_to(bits: int) -> None:
    """Apart from the step's digits: 2^-11 of it for each code."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(bits)) * 3
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    apart = (decode_tokens(*encode_tokens(x, bits)) - fake_quantize_tokens(x, bits)).abs().amax(-1)
    agree = apart <= step * 2**bits * 2**-11
    assert agree.float().mean() > (0.9 if bits < 7 else 0.5)  # in the rest a number lies where codes meet
    assert (apart <= 1.01 * step + step * 2**bits * 2**-11).all()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 8),
        torch.full((1, 8), 7.25),
        torch.linspace(1000, 1000.01, 8)[None],
        -torch.linspace(1e4, 1e4 + 1, 8)[None],
        torch.linspace(-1e-7, 1e-7, 8)[None],
        torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 2e4]]),
    ],
    ids=["zeros", "constant", "far", "far_below", "tiny", "one_large"],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_vectors_of_any_kind_stay_near(x: Tensor, bits: int) -> None:
    found = decode_tokens(*encode_tokens(x, bits))
    span = (x.max() - x.min()) / (2**bits - 1)
    assert found.isfinite().all()
    assert ((found - x).abs() <= 0.51 * span * (1 + 2**bits * 2**-11) + x.abs().max() / 30000 + 1e-6).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sign", [1, -1])
def test_vectors_that_hardly_differ_keep_their_sign(bits: int, sign: int) -> None:
    """Whatever the step is rounded to: its digits, and those of float16's smallest numbers."""
    for spread in (0.0, 1e-4, 2e-3):
        x = sign * torch.logspace(-4, 4, 8001)[:, None] * torch.linspace(1, 1 + spread, 8)
        found = decode_tokens(*encode_tokens(x, bits))
        # half a step and half of the smallest one there can be, with digits lost
        allowed = x.abs().amax(1, keepdim=True) * (0.52 * spread / (2**bits - 1) + 1 / 30000) + 1e-6
        assert ((found - x).abs() <= allowed).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [1, 12, 64, 80])
def test_vectors_are_packed_each_by_itself(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, 5, n), dtype=torch.uint8)
    stream = pack_tokens(codes, bits)
    assert stream.shape == (2, 3, 5, -(-n * bits // 8))
    assert torch.equal(unpack_tokens(stream, bits, n), codes)
    assert torch.equal(unpack_tokens(stream[:, 1:, 2:4], bits, n), codes[:, 1:, 2:4])


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_of_fixed_grids_are_what_rounding_gives(bits: int) -> None:
    x = 4 * torch.randn(2, 3, 5, 12)
    scale, zero = (torch.rand(1, 3, 1, 12) + 0.1).half().float(), torch.randint(0, 2**bits, (1, 3, 1, 12)).float()
    codes = encode_channels(x, scale, zero, bits)
    assert torch.equal(decode_channels(codes, scale, zero), fake_quantize_channels(x, scale, zero, bits))

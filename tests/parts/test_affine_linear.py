"""The affine weight quantiser: what it learns, and that what is stored is what was trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.errors import InputError
from ptql.functional import affine
from ptql.parts.weights import Affine, LinearQuantizer
from ptql.recipe import IntScheme

SHAPES = [(576, 128, 5), (172, 32, 6), (48, -1, 1), (48, 16, 3), (20, 64, 1)]  # row, group size, groups


def quantizer(
    w: Tensor, scheme: IntScheme, clip: bool = True, initial: float = 4.0, lr: float = 1e-2
) -> LinearQuantizer:
    return Affine(clip, initial, lr).for_linear("mlp.up_proj", w, scheme)


def some_weights(row: int) -> Tensor:
    torch.manual_seed(row)
    w = torch.randn(6, row) * 0.1
    w[0] = w[0].abs() + 0.1  # a row of one sign
    w[1] = -w[1].abs()
    w[2] = 0
    return w


def scatter(q: LinearQuantizer) -> LinearQuantizer:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in q.parameters():
            p.normal_(2.0, 1.5)
    return q


@pytest.mark.parametrize(("row", "group_size", "groups"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_two_logits_for_each_group(row: int, group_size: int, groups: int, symmetric: bool) -> None:
    q = quantizer(some_weights(row), IntScheme(3, group_size, symmetric), initial=2.5, lr=3e-3)
    assert {name: tuple(p.shape) for name, p in q.named_parameters()} == {
        "lower": (6, groups),
        "upper": (6, groups),
    }
    assert all((p == 2.5).all() and p.dtype == torch.float32 for p in q.parameters())
    assert q.lr == 3e-3


def test_the_default_is_omniquants() -> None:
    q = quantizer(some_weights(48), IntScheme())
    assert all(p.sigmoid().flatten().tolist() == pytest.approx([0.98201] * 6, abs=5e-6) for p in q.parameters())
    assert q.lr == 1e-2


def test_without_clipping_there_is_nothing_to_learn() -> None:
    w = some_weights(48)
    q = quantizer(w, IntScheme(4, 16), clip=False)
    assert list(q.parameters()) == []
    wide = quantizer(w, IntScheme(4, 16), initial=40.0)  # sigmoid(40) is 1 in float32
    assert torch.equal(q.fake(w), wide.fake(w))


@pytest.mark.parametrize(("row", "group_size", "groups"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_stored_is_what_was_trained(bits: int, symmetric: bool, row: int, group_size: int, groups: int) -> None:
    """Up to the scale's float16: one part in 2^11, and a code more or less where that tips one."""
    w, scheme = some_weights(row), IntScheme(bits, group_size, symmetric)
    q = scatter(quantizer(w, scheme))
    with torch.no_grad():
        fake, decoded = q.fake(w), q.decode(q.encode(w))
    assert (fake.dtype, decoded.dtype) == (torch.float32, torch.float32)
    columns = scheme.columns(row)
    with torch.no_grad():
        low, high = affine.weight_range(affine.grouped(w, columns), q.lower, q.upper)
        scale, _ = affine.scale_and_zero(low, high, bits, symmetric)
    step = affine.ungrouped(scale.expand(-1, -1, columns), row)
    difference = (fake - decoded).abs()
    assert (difference <= step * 1.13 + 1e-7).all()  # a code, and 255 codes times 2^-11
    same = difference <= step * 2 ** (bits - 10) + 1e-7
    assert same.double().mean() > (0.97 if bits < 8 else 0.8)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_they_agree_bit_by_bit_where_float16_holds_the_scale(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    low, high = (
        (2 ** (bits - 1) - 1, 2 ** (bits - 1) - 1) if symmetric else (2 ** (bits - 2), 2**bits - 1 - 2 ** (bits - 2))
    )
    w = torch.empty(6, 40).uniform_(-low, high)
    w[:, ::8], w[:, 1::8] = -low, high  # every group of 16, and the short one, has the range -low .. high
    w *= torch.tensor([[2.0**-3], [2.0**-7], [0.0371], [0.5], [3.0], [0.011]]).half().float()
    q = quantizer(w, IntScheme(bits, 16, symmetric), clip=False)
    with torch.no_grad():
        fake, decoded = q.fake(w), q.decode(q.encode(w))
    assert torch.equal(fake[[0, 1, 3]], decoded[[0, 1, 3]])  # steps that are powers of two: no rounding anywhere
    torch.testing.assert_close(fake, decoded, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("symmetric", [False, True])
def test_stored_tensors_have_the_names_and_dtypes_of_the_format(symmetric: bool) -> None:
    w = some_weights(172)
    stored = quantizer(w, IntScheme(3, 32, symmetric)).encode(w)
    found = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    expected = {
        "codes": ((6, 65), torch.uint8),
        "scale": ((6, 6), torch.int16),
        "zero": ((6, 3), torch.uint8),
    }
    if symmetric:
        del expected["zero"]
    assert found == expected
    assert not any(t.requires_grad for t in stored.values())


def test_the_fake_weights_carry_gradients_to_weights_and_logits() -> None:
    w = some_weights(48).requires_grad_()
    q = scatter(quantizer(w, IntScheme(3, 16)))
    (q.fake(w) * torch.randn(6, 48)).sum().backward()
    for leaf in (w, q.lower, q.upper):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()
    assert not q.lower.grad[0].any()  # a row above zero has no lower end to clip


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan")])
def test_a_learning_rate_is_above_zero(lr: float) -> None:
    with pytest.raises(InputError, match=r"lr=.*above 0; take `clip: false`"):
        Affine(lr=lr)


@pytest.mark.parametrize("bits", [0, 1, 9, 15, 17, -4, True])
def test_widths_that_no_code_has_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=rf"bits={bits}: .*2 to 8 .*use 16"):
        IntScheme(bits)


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_holds_a_column(group_size: int) -> None:
    with pytest.raises(InputError, match=rf"group_size={group_size}: .*use -1"):
        IntScheme(4, group_size)

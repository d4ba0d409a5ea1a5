"""PTQ1.61's weight quantiser, against its formulas by loops in float64, and that what is stored is what was learned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from ptql.errors import InputError
from ptql.nn.salient_linear import SalientLinear
from ptql.nn.signed_product import ChannelOrder
from ptql.parts.inputs import InputRange
from ptql.parts.weights import Affine, LinearQuantizer, SalientBinary
from ptql.parts.weights.affine import AffineLinear
from ptql.recipe import IntScheme, LayerSchemes

HALF = 2.0**-11  # a float16 number's relative precision


def inputs(columns: int) -> InputRange:
    torch.manual_seed(5)
    high, low = torch.rand(columns), -torch.rand(columns)
    return InputRange(low, high, (low + high) / 2, torch.rand(columns))


def quantizer(w: Tensor, share: float = 0.2, bits: int = 4, **settings: Any) -> LinearQuantizer:
    scheme = IntScheme(1, salient=share, salient_bits=bits)
    return SalientBinary(**settings).for_linear("any", w, scheme, inputs(w.shape[1]))


def moved(made: LinearQuantizer) -> LinearQuantizer:
    """With learnables somewhere."""
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return made


def some_weights(rows: int = 6, columns: int = 23) -> Tensor:
    torch.manual_seed(columns)
    w = torch.randn(rows, columns) * 0.1 + 0.01
    w[0] = w[0].abs() + 0.1  # a row of one sign
    w[1] = 0
    return w


def by_loops(w: Tensor, made: Any, size: Tensor, share: float, bits: int, faithful: bool) -> Tensor:
    """The paper's and the code's formulas, number by number."""
    rows, columns = w.shape
    count = int(share * columns)
    salient = sorted(sorted(range(columns), key=lambda j: (-float(size[j]), j))[:count])
    others = [j for j in range(columns) if j not in salient]
    out = torch.zeros(rows, columns, dtype=torch.float64)
    top = 2**bits - 1
    for i in range(rows):
        row = [float(x) for x in w[i]]
        mean = sum(row[j] for j in others) / len(others)
        for j in others:
            r = made.rows[i, 0].item() * made.columns[0, j].item()
            sign = 1.0 if w[i, j] >= made.mean[i, 0] else -1.0
            out[i, j] = r * (float(made.scale[i, 0]) * sign + mean)
        if salient:
            among = row if faithful else [row[j] for j in salient]
            low, high = min(0.0, *among), max(0.0, *among)
            if not faithful:
                low, high = (x * float(c[i, 0].sigmoid()) for x, c in ((low, made.lower), (high, made.upper)))
            step = max((high - low) / top, 1e-6)
            zero = round(-low / step)
            for j in salient:
                out[i, j] = step * (min(max(round(row[j] / step) + zero, 0), top) - zero)
    return out


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("statistic", ["max", "mean"])
@pytest.mark.parametrize(("share", "bits"), [(0.2, 4), (0.3, 2), (0.0, 4)])
def test_the_rounded_weight(share: float, bits: int, statistic: str, faithful: bool) -> None:
    w = some_weights()
    made: Any = moved(quantizer(w, share, bits, statistic=statistic, faithful=faithful))
    size = inputs(23).absmax if statistic == "max" else inputs(23).mean
    expected = by_loops(w, made, size, share, bits, faithful)
    assert torch.allclose(made.fake(w).double(), expected, rtol=1e-5, atol=1e-7)


def test_it_begins_with_means_of_magnitudes() -> None:
    w = some_weights()
    made: Any = quantizer(w, 0.0)
    assert torch.allclose(made.scale.flatten().double(), w.double().abs().mean(1))
    assert torch.equal(made.rows, torch.ones(6, 1))
    assert torch.equal(made.columns, torch.ones(1, 23))


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_not_written_out_it_is_the_same_with_the_same_gradients(share: float, faithful: bool) -> None:
    w = some_weights()
    one: Any = moved(quantizer(w, share, faithful=faithful))
    two: Any = copy.deepcopy(one)
    x, by = torch.randn(3, 4, 23), torch.randn(3, 4, 6)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = inputs[0] @ one.fake(w).T
    with torch.no_grad():
        product = two.product(w, ChannelOrder(two.salient, readers=1), torch.float32)
    made = functional_call(product, two.factors(w, product), (inputs[1],))
    assert torch.allclose(made, expected, rtol=1e-5, atol=1e-6)
    (expected * by).sum().backward()
    (made * by).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-6)
    for name, parameter in one.named_parameters():
        assert torch.allclose(parameter.grad, getattr(two, name).grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize(("share", "bits", "columns"), [(0.2, 4, 23), (0.5, 3, 16), (0.0, 4, 9), (0.05, 8, 19)])
def test_what_is_stored_is_what_was_learned(share: float, bits: int, columns: int, faithful: bool) -> None:
    w = some_weights(columns=columns)
    made = moved(quantizer(w, share, bits, faithful=faithful))
    stored = made.encode(w)
    found, expected = made.decode(stored), made.fake(w)
    step = (w.max(1).values - w.min(1).values).clamp(min=1e-3)[:, None] / (2**bits - 1)
    assert (found - expected).abs().le(step * 1e-2 + expected.abs() * 4 * HALF + 1e-6).float().mean() > 0.97
    layer = SalientLinear(columns, 6, IntScheme(1, salient=share, salient_bits=bits), bias=False, rounding=None)
    assert {name: t.shape for name, t in layer.state_dict().items()} == {name: t.shape for name, t in stored.items()}
    layer.load_state_dict(stored)
    assert torch.equal(layer.dense_weight(), found)
    x = torch.randn(4, columns)
    assert torch.equal(layer(x), layer.to_dense()(x))


def test_true_bits_of_a_large_matrix() -> None:
    layer = SalientLinear(4096, 4096, IntScheme(1, salient=0.2), bias=False, rounding=None, device="meta")
    bits = sum(t.numel() * t.element_size() * 8 for t in layer.parameters()) / 4096**2
    streams, gains, factors, points, mask = 2 * 410 * 8, 3 * 16, 3277 * 16 / 4096, 4, 1
    assert bits == pytest.approx((streams + gains + factors + points + mask) / 4096)
    assert bits == pytest.approx(1.6176, abs=1e-4)


def test_rates() -> None:
    made = quantizer(some_weights(), faithful=False, lr=1e-4, factor_lr=2e-3, clip_lr=3e-2)
    rates = {name: made.rate(name) for name, _ in made.named_parameters()}
    assert rates == {"scale": 1e-4, "rows": 2e-3, "columns": 2e-3, "lower": 3e-2, "upper": 3e-2}
    made.set_rate(0.5)
    assert {made.rate(name) for name in rates} == {0.5}


def test_nothing_is_learned_if_not_asked_for() -> None:
    assert not any(p.requires_grad for p in quantizer(some_weights(), learn=False, faithful=False).parameters())
    of_faithful = dict(quantizer(some_weights()).named_parameters())
    assert of_faithful.keys() == {"scale", "rows", "columns"}


def test_other_formats_are_rounded_affinely() -> None:
    made = SalientBinary().for_linear("any", some_weights(), IntScheme(4))
    assert isinstance(made, AffineLinear)
    SalientBinary().check(LayerSchemes(IntScheme(1, salient=0.2), {"0.down": IntScheme(8)}))
    with pytest.raises(InputError, match=r"bits=4 with SalientBinary.*use weight: {bits: 1, salient: 0.2}"):
        SalientBinary().check(LayerSchemes(IntScheme(4)))


def test_affine_has_no_salient_channels() -> None:
    for schemes in (
        LayerSchemes(IntScheme(1, salient=0.2)),
        LayerSchemes(IntScheme(4), {"0.down": IntScheme(1, salient=0.0)}),
    ):
        with pytest.raises(InputError, match=r"salient=0\.[02] with Affine.*use the weight quantiser SalientBinary"):
            Affine().check(schemes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"lr=0.0: .*learn: false"),
        ({"factor_lr": float("nan")}, r"lr=nan: .*learn: false"),
    ],
)
def test_wrong_settings(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SalientBinary(**settings)

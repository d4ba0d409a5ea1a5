"""The part GPTQ: the grids are those of `Affine`, and so is all but the codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.errors import InputError
from ptql.functional import affine, gptq
from ptql.nn.packed_linear import PackedLinear
from ptql.parts import settings
from ptql.parts.weights import Affine, Gptq, LinearQuantizer
from ptql.recipe import IntScheme, LayerSchemes

SCHEMES = [
    IntScheme(1, 16),
    IntScheme(1, symmetric=True, balanced=True),
    IntScheme(2, 16, symmetric=True, balanced=True),
    IntScheme(3, 16),
    IntScheme(4, -1, symmetric=True),
    IntScheme(8, 32),
]


def some_weights(row: int = 40, rows: int = 6) -> Tensor:
    torch.manual_seed(row)
    return torch.randn(rows, row) * 0.1


def some_moments(row: int = 40) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(500, 4) @ torch.randn(4, row) + 0.5 * torch.randn(500, row)
    return 2 / 500 * x.t() @ x


def turned(made: LinearQuantizer) -> LinearQuantizer:
    """As after some learning."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(1.0 if name in ("left", "right") else 2.0, 0.3)
    return made


def both(w: Tensor, scheme: IntScheme, **given: Any) -> tuple[LinearQuantizer, LinearQuantizer]:
    """GPTQ and rounding to nearest, learned alike."""
    own = {name: given.pop(name) for name in ("damping", "act_order") if name in given}
    kinds = Gptq(**given, **own), Affine(**given)
    first, second = (turned(kind.for_linear("any", w, scheme)) for kind in kinds)
    return first, second


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_grids_are_those_of_affine_and_outputs_are_nearer(scheme: IntScheme, clip: bool, act_order: bool) -> None:
    w, moments = some_weights(), some_moments()
    mine, nearest = both(w, scheme, clip=clip, act_order=act_order)
    with torch.no_grad():
        stored, plain = mine.encode_on(w, moments), nearest.encode(w)
    assert stored.keys() == plain.keys()
    assert all(torch.equal(stored[name], plain[name]) for name in stored.keys() - {"codes"})
    assert (stored["codes"].shape, stored["codes"].dtype) == (plain["codes"].shape, torch.uint8)
    errors = [(lost @ moments * lost).sum() for lost in (mine.decode(stored) - w, nearest.decode(plain) - w)]
    assert errors[0] < 0.9 * errors[1]
    loaded = PackedLinear(40, 6, scheme, bias=False, rounding=None)
    loaded.load_state_dict(stored)
    assert torch.equal(loaded.dense_weight(), mine.decode(stored))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_while_learning_it_is_affine(rank: int) -> None:
    w = some_weights()
    mine, nearest = both(w, IntScheme(3, 16), factor_rank=rank)
    assert torch.equal(mine.fake(w), nearest.fake(w))
    assert [name for name, _ in mine.named_parameters()] == [name for name, _ in nearest.named_parameters()]
    for name, tensor in nearest.encode(w).items():  # where nothing is known of inputs
        assert torch.equal(mine.encode(w)[name], tensor)


@pytest.mark.parametrize("rank", [1, 2])
def test_codes_make_up_for_what_factors_do_as_stored(rank: int) -> None:
    w, moments, scheme = some_weights(), some_moments(), IntScheme(3, 16)
    mine, nearest = both(w, scheme, factor_rank=rank)
    with torch.no_grad():
        stored, plain = mine.encode_on(w, moments), nearest.encode(w)
        without = mine.decode({**stored, "codes": plain["codes"]})
    assert all(torch.equal(stored[name], plain[name]) for name in ("scale", "zero", "left", "right"))
    lost, lost_nearest = mine.decode(stored) - w, without - w
    assert (lost @ moments * lost).sum() < 0.3 * (lost_nearest @ moments * lost_nearest).sum()


def test_its_settings_reach_the_codes() -> None:
    w, moments, scheme = some_weights(), some_moments(), IntScheme(3, 16)
    low, high = affine.weight_range(affine.grouped(w, 16))
    for damping, act_order in ((0.01, False), (1.0, False), (0.01, True)):
        made = Gptq(clip=False, damping=damping, act_order=act_order).for_linear("any", w, scheme)
        expected = gptq.encode(w, moments, low, high, 8, 16, False, damping, act_order)
        assert torch.equal(made.decode(made.encode_on(w, moments)), affine.dequantize(*expected, 8, 16))


def test_what_became_of_the_damping_is_remarked() -> None:
    w, moments = some_weights(), some_moments()
    made = Gptq(clip=False).for_linear("any", w, IntScheme(3, 16))
    made.encode_on(w, torch.zeros_like(moments))
    assert made.remark == "rounded to nearest: the moments of its inputs hold zeros alone, or no finite numbers"
    less = moments - 2 * torch.linalg.eigvalsh(moments)[0] * torch.eye(len(moments))
    less -= 0.1 * moments.diagonal().mean() * torch.eye(len(moments))
    made.encode_on(w, less)
    assert made.remark is not None
    assert made.remark.startswith("GPTQ with a damping of ")
    assert made.remark.endswith(" instead of 0.01: its inputs hardly differ")
    made.encode_on(w, moments)
    assert made.remark is None


def test_the_defaults_are_those_of_affine_and_the_usual_damping() -> None:
    part = Gptq()
    assert part.wants_moments
    assert settings(part) == {"class": "Gptq", **vars(Affine()), "damping": 0.01, "act_order": True}
    assert not Affine.wants_moments


@pytest.mark.parametrize("damping", [0.0, -0.01, 1.5, float("nan")])
def test_a_damping_is_a_small_part(damping: float) -> None:
    with pytest.raises(InputError, match=rf"damping={damping}: .*1e-06 to 1; 0.01 is usual"):
        Gptq(damping=damping)


def test_what_affine_refuses_it_refuses() -> None:
    with pytest.raises(InputError, match="initial=search with clip=false"):
        Gptq(clip=False, initial="search")
    with pytest.raises(InputError, match=r"salient=0.2 with Gptq, .*SalientBinary"):
        Gptq().check(LayerSchemes(IntScheme(1, salient=0.2)))

"""What is differentiated of a loss, against a loop in Python's float64."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.errors import InputError
from ptql.parts import settings
from ptql.parts.objectives import PlainSum, Reconstruction, RunningAverages, total

KINDS = (("mse_fp", "mse_fp_on_quantised"), ("nlc_fp", "nlc_fp_on_quantised"))
EMA: dict[str, Any] = {"targets": ("fp", "fp_on_quantised"), "balance": "ema"}


def steps(count: int = 30) -> list[dict[str, Tensor]]:
    """Losses of very different sizes that fall."""
    torch.manual_seed(0)
    sizes = {"mse_fp": 1e-3, "mse_fp_on_quantised": 3e-4, "nlc_fp": 0.5, "nlc_fp_on_quantised": 2.0}
    return [
        {name: (torch.rand(()) + 0.5).mul(size * 0.9**step).requires_grad_() for name, size in sizes.items()}
        for step in range(count)
    ]


def by_hand(losses: list[dict[str, Tensor]], initial: float | None) -> tuple[list[float], list[list[float]]]:
    """Balanced losses, and the averages that divide, step by step."""
    averages: list[float] = []
    made, history = [], []
    for terms in losses:
        values = [sum(terms[name].item() for name in names) for names in KINDS]
        if not averages:
            averages = values if initial is None else [initial] * len(KINDS)
        averages = [0.95 * a + 0.05 * v for a, v in zip(averages, values, strict=True)]
        made.append(sum(v / (a + 1e-6) for a, v in zip(averages, values, strict=True)))
        history.append(averages)
    return made, history


@pytest.mark.parametrize("initial", [None, 1.0])
def test_each_kind_is_divided_by_its_running_average(initial: float | None) -> None:
    balance, losses = RunningAverages(KINDS, initial), steps()
    expected, averages = by_hand(losses, initial)
    for terms, value, average in zip(losses, expected, averages, strict=True):
        made = balance(total(terms), terms)
        assert made.shape == ()
        assert made.item() == pytest.approx(value, rel=1e-5)
        assert balance.averages.tolist() == pytest.approx(average, rel=1e-5)
        made.backward()
        for names, a in zip(KINDS, average, strict=True):  # an average is a number to the gradient
            for name in names:
                assert terms[name].grad.item() == pytest.approx(1 / (a + 1e-6), rel=1e-5)
    first = by_hand(losses[:1], initial)[0][0]
    assert (first == pytest.approx(2, abs=0.01)) == (initial is None)  # else the MSE is hardly in it


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 3])
def test_what_is_not_finite_is_kept_out_of_every_average(bad: float, at: int) -> None:
    balance, losses = RunningAverages(KINDS), steps(6)
    for step, terms in enumerate(losses):
        if step == at:
            before = balance.averages.clone()
            wrong = {**terms, "nlc_fp": terms["nlc_fp"] * bad}
            assert not balance(total(wrong), wrong).isfinite()
            assert torch.equal(balance.averages, before)
        balance(total(terms), terms)
    assert balance.averages.tolist() == pytest.approx(by_hand(losses, None)[1][-1], rel=1e-5)


def test_the_averages_are_a_state_that_goes_on() -> None:
    losses = steps()
    balance, again = RunningAverages(KINDS), RunningAverages(KINDS)
    for terms in losses[:10]:
        balance(total(terms), terms)
    assert balance.state_dict().keys() == {"averages"}
    again.load_state_dict(balance.state_dict())
    for terms in losses[10:]:
        assert torch.equal(balance(total(terms), terms), again(total(terms), terms))
    assert list(balance.parameters()) == []


def test_the_sum_is_the_loss_itself() -> None:
    balance, (terms, *_) = Reconstruction().balance_for_block(), steps(1)
    loss = total(terms)
    assert type(balance) is PlainSum
    assert balance(loss, terms) is loss
    assert balance.state_dict() == {}


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [
        (EMA, KINDS),
        ({"balance": "ema"}, (("mse_fp",), ("nlc_fp",))),
        ({"balance": "ema", "mse": 0.0, "rse": 0.5}, (("nlc_fp",), ("rse_fp",))),
        ({**EMA, "nlc": 0.0}, KINDS[:1]),
    ],
)
def test_a_kind_is_a_loss_over_all_targets(recipe: dict[str, Any], kinds: tuple[tuple[str, ...], ...]) -> None:
    objective = Reconstruction(**recipe)
    balance = objective.balance_for_block()
    assert isinstance(balance, RunningAverages)
    assert balance.kinds == kinds
    outputs = {target: torch.randn(2, 5, 8) for target in objective.targets}
    terms = objective.terms(torch.randn(2, 5, 8), outputs)
    assert {name for names in kinds for name in names} == terms.keys()
    assert balance(total(terms), terms).item() == pytest.approx(len(kinds), rel=1e-2)
    assert objective.balance_for_block() is not balance  # each block has its own


def test_the_originals_averages_start_at_one() -> None:
    assert Reconstruction(**EMA, faithful=True).balance_for_block().averages.tolist() == [1.0, 1.0]
    assert Reconstruction(**EMA).balance_for_block().averages.tolist() == [0.0, 0.0]


def test_the_balance_is_part_of_what_a_run_is() -> None:
    found = settings(Reconstruction(**EMA, faithful=True))
    assert (found["balance"], found["faithful"]) == ("ema", True)
    assert settings(Reconstruction())["balance"] == "sum"


def test_another_balance_is_refused() -> None:
    unchecked = inspect.unwrap(Reconstruction.__init__)  # as outside of tests: no check of types
    with pytest.raises(InputError, match=r"balance='mean': one of sum, ema is needed; leave out for sum"):
        unchecked(object.__new__(Reconstruction), balance="mean")

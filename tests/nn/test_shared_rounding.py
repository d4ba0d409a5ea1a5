"""An input that several layers read is rounded once, and not held longer than needed."""

from __future__ import annotations

import torch

from ptql.nn.quant_linear import SharedRounding
from ptql.parts.activations import TokenRounding


def counting() -> tuple[list[int], SharedRounding]:
    calls: list[int] = []

    def rounding(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return TokenRounding(4)(x)

    return calls, SharedRounding(rounding, readers=3)


def test_three_readers_of_one_input_round_it_once() -> None:
    calls, shared = counting()
    x = torch.randn(2, 5, 16)
    rounded = [shared(x) for _ in range(3)]
    assert len(calls) == 1
    assert all(torch.equal(r, TokenRounding(4)(x)) for r in rounded)
    assert shared._input is None
    assert shared._rounded is None


def test_another_input_is_rounded_anew_even_if_a_reader_was_left_out() -> None:
    calls, shared = counting()
    first, second = torch.randn(4, 16), torch.randn(4, 16)
    shared(first)
    assert torch.equal(shared(second), TokenRounding(4)(second))
    assert len(calls) == 2


def test_gradients_of_all_readers_reach_the_input() -> None:
    _, shared = counting()
    x = torch.randn(4, 16, requires_grad=True)
    (shared(x).sum() + 2 * shared(x).sum()).backward()
    own = x.detach().clone().requires_grad_()
    (3 * TokenRounding(4)(own).sum()).backward()
    torch.testing.assert_close(x.grad, own.grad)

"""Signs with gains, against loops in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptql.functional.binary import (
    channel_order,
    others_first_moments,
    permuted,
    salient_channels,
    signed_product,
    signs,
)


def test_the_largest_channels_are_salient_and_of_equals_the_first() -> None:
    size = torch.tensor([1.0, 5.0, 3.0, 3.0, 0.0, 3.0])
    assert salient_channels(size, 3).tolist() == [False, True, True, True, False, False]
    assert salient_channels(size, 0).sum() == 0
    assert salient_channels(size, 6).all()


def test_moments_and_signs_are_those_of_the_other_channels() -> None:
    w = torch.tensor([[1.0, -2.0, 9.0, 4.0], [0.5, 0.5, -7.0, 0.5]])
    mean, scale = others_first_moments(w, torch.tensor([0, 1, 3]))
    assert mean.tolist() == [[1.0], [0.5]]
    assert scale.flatten().tolist() == pytest.approx([7 / 3, 0.5])
    assert signs(w, mean).tolist() == [[1, -1, 1, 1], [1, 1, -1, 1]]


def dense(sign: Tensor, hats: Tensor, salient: list[int], gain: Tensor, mean: Tensor, columns: Tensor) -> Tensor:
    """The matrix that `signed_product` stands for, differentiable, number by number."""
    rows = []
    for i in range(sign.shape[0]):
        row = []
        for j in range(sign.shape[1]):
            other = (gain[i] * float(sign[i, j]) + mean[i]) * columns[j]
            row.append(hats[i, salient.index(j)] if j in salient else other)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("salient", [[], [1, 4], [0, 1, 2, 3, 4, 5]])
def test_the_product_and_its_gradients_are_those_of_the_matrix(salient: list[int], multiple: int) -> None:
    torch.manual_seed(0)
    out, into = 5, 7
    is_salient = torch.zeros(into, dtype=torch.bool)
    is_salient[salient] = True
    sign = torch.where(torch.randn(out, into) > 0, 1.0, -1.0).double()
    shapes = ((3, 2, into), (out, len(salient)), (out,), (out,), (into,))
    learned = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    ours, theirs = ([t.clone().requires_grad_() for t in learned] for _ in range(2))
    order, place, others = channel_order(is_salient, multiple)
    assert others % multiple == (len(order) - others) % multiple == 0
    assert torch.equal(order[place], torch.arange(into))
    x, hats, gain, mean, columns = ours
    count = into - len(salient)
    kept = torch.zeros(out, others, dtype=torch.float64)
    kept[:, :count] = sign[:, order[:count]]
    filled = F.pad(hats, (0, len(order) - others - len(salient)))
    of_others = F.pad(columns[order[:count]], (0, others - count))
    made = signed_product(permuted(x, order, place), kept, gain, mean, of_others, filled)
    expected = theirs[0] @ dense(sign, theirs[1], salient, *theirs[2:]).T
    assert torch.allclose(made, expected, rtol=1e-12, atol=1e-12)
    by = torch.randn_like(made)
    (made * by).sum().backward()
    (expected * by).sum().backward()
    for mine, loop in zip(ours, theirs, strict=True):
        expected_grad = torch.zeros_like(mine) if loop.grad is None else loop.grad
        found = torch.zeros_like(mine) if mine.grad is None else mine.grad
        assert torch.allclose(found, expected_grad, rtol=1e-12, atol=1e-12)

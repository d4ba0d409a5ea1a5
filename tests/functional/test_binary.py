"""Signs with gains, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.functional.binary import binary_into, others_first_moments, salient_channels, signs


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


def by_loops(sign: Tensor, channels: Tensor, hats: Tensor, gain: Tensor, mean: Tensor, columns: Tensor) -> Tensor:
    """Differentiable, number by number."""
    salient, rows = channels.tolist(), []
    for i in range(sign.shape[0]):
        row = []
        for j in range(sign.shape[1]):
            other = (gain[i, 0] * float(sign[i, j]) + mean[i, 0]) * columns[0, j]
            row.append(hats[i, salient.index(j)] if j in salient else other)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("salient", [[], [1, 4], [0, 1, 2, 3, 4, 5, 6]])
def test_what_is_written_and_its_gradients(salient: list[int]) -> None:
    torch.manual_seed(0)
    out, into = 5, 7
    sign = torch.randint(0, 2, (out, into)).mul_(2).sub_(1).to(torch.int8)
    channels = torch.tensor(salient, dtype=torch.long)
    learned = [torch.randn(*s, dtype=torch.float64) for s in ((out, len(salient)), (out, 1), (out, 1), (1, into))]
    ours, theirs = ([t.clone().requires_grad_() for t in learned] for _ in range(2))
    place = torch.full((out, into), torch.nan, dtype=torch.float64)
    made, expected = binary_into(sign, channels, *ours, place), by_loops(sign, channels, *theirs)
    assert torch.equal(place, made)
    assert torch.allclose(made, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(out, into, dtype=torch.float64)
    (made * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, loop in zip(ours, theirs, strict=True):
        expected_grad = torch.zeros_like(mine) if loop.grad is None else loop.grad
        assert mine.grad is not None
        assert torch.allclose(mine.grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_a_narrow_place_gets_rounded_numbers_and_gives_wide_gradients() -> None:
    torch.manual_seed(1)
    sign, channels = torch.ones(3, 4, dtype=torch.int8), torch.tensor([2])
    gain = torch.rand(3, 1, requires_grad=True)
    hats, mean, columns = torch.rand(3, 1, dtype=torch.bfloat16), torch.rand(3, 1), torch.rand(1, 4)
    place = torch.empty(3, 4, dtype=torch.bfloat16)
    made = binary_into(sign, channels, hats, gain, mean, columns, place)
    expected = ((gain + mean) * columns).bfloat16()
    expected[:, 2:3] = hats
    assert torch.equal(made, expected)
    made.float().sum().backward()
    assert gain.grad is not None
    assert gain.grad.dtype == torch.float32
    assert torch.allclose(gain.grad, columns[:, [0, 1, 3]].sum().expand(3, 1))

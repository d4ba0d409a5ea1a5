"""What is written into prepared memory is there, in its dtype, and gradients pass as if nothing had been written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.functional.buffers import stacked, write_into


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float64])
def test_a_tensor_is_written_and_its_gradient_passes(dtype: torch.dtype, source_dtype: torch.dtype) -> None:
    source = torch.randn(3, 4, dtype=source_dtype, requires_grad=True)
    place = torch.full((3, 4), float("nan"), dtype=dtype)
    written = write_into(source * 2, place)
    assert written.dtype == dtype
    assert same_memory(written, place)
    assert torch.equal(place, (source.detach() * 2).to(dtype))
    assert not place.requires_grad
    grad = torch.randn(3, 4).to(dtype)
    written.backward(grad)
    assert source.grad is not None
    assert source.grad.dtype == source_dtype
    assert torch.equal(source.grad, 2 * grad.to(source_dtype))


def test_what_nobody_learns_is_written_without_gradients() -> None:
    place = torch.empty(2, 2)
    written = write_into(torch.ones(2, 2), place)
    assert not written.requires_grad
    assert same_memory(written, place)
    assert torch.equal(place, torch.ones(2, 2))


def test_writing_again_goes_to_the_same_memory_and_leaves_earlier_gradients_right() -> None:
    """A step's weights are written each step; the way back of the step before does not read them."""
    place = torch.empty(2, 3)
    first, second = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    one = write_into(first, place)
    two = write_into(second, place)
    assert same_memory(one, two)
    assert torch.equal(one, second)
    one.backward(torch.full((2, 3), 5.0))
    assert torch.equal(first.grad, torch.full((2, 3), 5.0))  # type: ignore[arg-type]
    assert second.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_that_lie_below_each_other_are_one_matrix(dtype: torch.dtype) -> None:
    buffer = torch.empty(6, 4, dtype=dtype)
    parts = [torch.randn(rows, 4, requires_grad=True) for rows in (3, 1, 2)]
    places = buffer.split([3, 1, 2])
    written = [write_into(part * (k + 1), place) for k, (part, place) in enumerate(zip(parts, places, strict=True))]
    whole = stacked(buffer, written)
    assert same_memory(whole, buffer)
    assert whole.dtype == dtype
    assert torch.equal(whole, torch.cat([part.detach() * (k + 1) for k, part in enumerate(parts)]).to(dtype))
    x, grad = torch.randn(5, 4, dtype=dtype), torch.randn(5, 6, dtype=dtype)
    (x @ whole.t()).backward(grad)
    expected = (grad.t() @ x).float().split([3, 1, 2])
    for k, (part, found) in enumerate(zip(parts, expected, strict=True)):
        torch.testing.assert_close(part.grad, (k + 1) * found)


def test_a_part_that_nobody_learns_is_stacked_beside_one_that_is_learned() -> None:
    buffer, learned = torch.empty(4, 2), torch.randn(2, 2, requires_grad=True)
    parts = [write_into(torch.ones(2, 2), buffer[:2]), write_into(learned, buffer[2:])]
    whole = stacked(buffer, parts)
    (whole * torch.arange(8.0).view(4, 2)).sum().backward()
    assert torch.equal(learned.grad, torch.tensor([[4.0, 5.0], [6.0, 7.0]]))  # type: ignore[arg-type]


def test_gradients_of_gradients_are_those_of_a_copy() -> None:
    source = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    place = torch.empty(4, 2, dtype=torch.float64)

    def through(x: Tensor) -> Tensor:
        return stacked(place, [write_into(x**2, place[:2]), write_into(x.sin(), place[2:])]).clone()

    assert torch.autograd.gradcheck(through, (source,))

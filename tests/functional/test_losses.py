"""Losses against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptql.functional.losses import kl_divergence, mean_squared_error, negative_log_cosine, relative_squared_error


def loop_mse(x: Tensor, y: Tensor) -> float:
    pairs = list(zip(x.double().flatten().tolist(), y.double().flatten().tolist(), strict=True))
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs)


def loop_nlc(x: Tensor, y: Tensor) -> float:
    """LRQuant: the mean comes first, then the absolute value, then the logarithm."""
    cosines = []
    for a, b in zip(x.double().flatten(0, 1).tolist(), y.double().flatten(0, 1).tolist(), strict=True):
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        cosines.append(dot / (math.sqrt(sum(p * p for p in a)) * math.sqrt(sum(q * q for q in b))))
    return -math.log(abs(sum(cosines) / len(cosines)))


def loop_rse(x: Tensor, y: Tensor) -> float:
    ratios = []
    for a, b in zip(x.double().flatten(0, 1).tolist(), y.double().flatten(0, 1).tolist(), strict=True):
        ratios.append(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / sum(q * q for q in b))
    return sum(ratios) / len(ratios)


LOSSES = [mean_squared_error, negative_log_cosine, relative_squared_error]


def pair(seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    target = torch.randn(3, 5, 8)
    target[0, 0] *= 100  # a massive token
    return target + noise * torch.randn(3, 5, 8), target


@pytest.mark.parametrize("seed", range(3))
def test_mean_squared_error_is_a_loop(seed: int) -> None:
    output, target = pair(seed)
    assert mean_squared_error(output, target).item() == pytest.approx(loop_mse(output, target), rel=1e-5)


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_negative_log_cosine_is_a_loop(noise: float) -> None:
    output, target = pair(1, noise)
    assert negative_log_cosine(output, target).item() == pytest.approx(loop_nlc(output, target), rel=1e-4)


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_relative_squared_error_is_a_loop(noise: float) -> None:
    output, target = pair(1, noise)
    assert relative_squared_error(output, target).item() == pytest.approx(loop_rse(output, target), rel=1e-5)
    assert relative_squared_error(target, target).item() == 0


def test_relative_errors_weigh_tokens_alike_and_nothing_is_divided_by_zero() -> None:
    output, target = pair(2)
    sizes = torch.rand(3, 5, 1) * 100 + 0.1
    expected = relative_squared_error(output, target).item()
    assert relative_squared_error(output * sizes, target * sizes).item() == pytest.approx(expected, rel=1e-5)
    target[1, 1] = 0
    assert relative_squared_error(output, target).isfinite()


@pytest.mark.parametrize("factor", [1.0, 0.01, 3.0, 1e4])
def test_positive_multiples_of_the_target_lose_nothing(factor: float) -> None:
    _, target = pair(2)
    assert negative_log_cosine(factor * target, target).item() == pytest.approx(0, abs=1e-6)


def test_the_opposite_direction_loses_nothing_either() -> None:
    _, target = pair(2)
    assert negative_log_cosine(-target, target).item() == pytest.approx(0, abs=1e-6)


def test_every_token_weighs_the_same_however_large() -> None:
    output, target = pair(3)
    scales = torch.rand(3, 5, 1) * 100 + 0.1
    expected = negative_log_cosine(output, target).item()
    assert negative_log_cosine(output * scales, target).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_definition(loss) -> None:
    output, target = pair(4)
    output.requires_grad_()
    (grad,) = torch.autograd.grad(loss(output, target), output)
    wide, aim = output.detach().double().requires_grad_(), target.double()
    if loss is mean_squared_error:
        value = ((wide - aim) ** 2).mean()
    elif loss is relative_squared_error:
        value = (((wide - aim) ** 2).sum(-1) / (aim**2).sum(-1)).mean()
    else:
        cosine = (wide * aim).sum(-1) / (wide.norm(dim=-1) * aim.norm(dim=-1))
        value = -cosine.mean().abs().log()
    (reference,) = torch.autograd.grad(value, wide)
    torch.testing.assert_close(grad.double(), reference, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_outputs_are_compared_in_float32(loss) -> None:
    output, target = pair(5)
    value = loss(output.bfloat16(), target.bfloat16())
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(output.bfloat16().float(), target.bfloat16().float()))


def test_a_zero_token_counts_as_a_right_angle() -> None:
    output, target = pair(6)
    output[1, 1] = 0
    assert negative_log_cosine(output, target).isfinite()


def loop_kl(x: Tensor, y: Tensor) -> float:
    nats = []
    for a, b in zip(x.double().flatten(0, 1).tolist(), y.double().flatten(0, 1).tolist(), strict=True):
        of_a, of_b = (sum(math.exp(v) for v in values) for values in (a, b))
        nats.append(sum(math.exp(q) / of_b * (q - p + math.log(of_a / of_b)) for p, q in zip(a, b, strict=True)))
    return sum(nats) / len(nats)


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_kl_divergence_is_a_loop(noise: float) -> None:
    output, target = pair(1, noise)
    expected = target.log_softmax(-1)
    assert kl_divergence(output, expected).item() == pytest.approx(loop_kl(output, target), rel=1e-4)
    assert kl_divergence(target + 3, expected).item() == pytest.approx(0, abs=1e-5)

from __future__ import annotations

import math

import pytest
import torch

from ptql.restoration.lora_task import Lesson, kl_divergence, merged


def lesson(steps: int, warmup: int) -> Lesson:
    return Lesson(
        r=4,
        alpha=6.0,
        dropout=0.1,
        linears=("q",),
        lr=1e-3,
        steps=steps,
        warmup=warmup,
        clip=1.0,
        distil=0.0,
        checkpointing=True,
        seed=1,
    )


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (20, 2), (50, 0), (10, 10)])
def test_the_rate_rises_and_falls_as_a_cosine(steps: int, warmup: int) -> None:
    """Half a turn of a unit vector, of which the rate is the height."""
    found = [lesson(steps, warmup).rate(step) for step in range(steps + 1)]
    for step in range(warmup):
        assert found[step] == pytest.approx((step + 1) / warmup)
    turn = complex(0, math.pi / max(steps - warmup, 1))
    for step in range(warmup, steps):
        height = (pow(math.e, turn * (step - warmup)).real + 1) / 2
        assert found[step] == pytest.approx(height)
    assert max(found) == pytest.approx(1.0)
    if steps > warmup:
        assert found[-1] == pytest.approx(0.0, abs=1e-12)
        assert found[steps - 1] > 0
        assert lesson(steps, warmup).rate(steps + 5) == found[-1]
    assert lesson(steps, warmup).scale == 1.5


def test_the_divergence_is_that_of_a_slow_reference() -> None:
    draw = torch.Generator().manual_seed(0)
    found, wanted = torch.randn(2, 2, 5, 7, generator=draw).mul(3).unbind()
    counts = torch.rand(2, 5, generator=draw) < 0.7
    total, number = 0.0, 0
    for row in range(2):
        for token in range(5):
            if not counts[row, token]:
                continue
            mine, theirs = ([math.exp(x) for x in logits[row, token].tolist()] for logits in (found, wanted))
            for k in range(7):
                p, q = theirs[k] / sum(theirs), mine[k] / sum(mine)
                total += p * (math.log(p) - math.log(q))
            number += 1
    assert 0 < number < 10
    assert kl_divergence(found, wanted, counts).item() == pytest.approx(total / number, rel=1e-5)
    assert kl_divergence(wanted.bfloat16(), wanted.bfloat16(), counts).item() == 0
    assert kl_divergence(found.bfloat16(), wanted.bfloat16(), counts).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_added_to_the_matrices_that_have_it(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {"m.layers.0.a.q.weight": (6, 5), "m.layers.0.a.q.bias": (6,), "m.layers.10.a.q.weight": (6, 5)}
    shapes |= {"m.layers.1.a.q.weight": (6, 5), "m.embed.weight": (9, 5)}
    tensors = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    factors = {"0.a.q.A": torch.randn(2, 5, generator=draw), "0.a.q.B": torch.randn(6, 2, generator=draw)}
    factors |= {"1.a.q.A": torch.randn(2, 5, generator=draw), "1.a.q.B": torch.randn(6, 2, generator=draw)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    found = dict(merged(iter(tensors.items()), "m.layers", factors, 1.5, dtype))
    assert list(found) == list(tensors)
    for name, tensor in before.items():
        wanted = tensor.double()
        for index in (0, 1):
            if name == f"m.layers.{index}.a.q.weight":
                wanted = wanted + 1.5 * (factors[f"{index}.a.q.B"].double() @ factors[f"{index}.a.q.A"].double())
        assert found[name].dtype == (torch.float32 if name == "m.embed.weight" else dtype)
        assert torch.allclose(found[name].double(), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        assert torch.equal(tensors[name], tensor)  # the packed model's own stay as they are

"""The distribution correction of the outer blocks: where it is, what it adds, and that it ends in the codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.calibration.activations import Streams
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.families import family_of
from ptql.functional.scaled import Scaled
from ptql.parts.objectives import Reconstruction
from ptql.parts.transforms import BlockFacts, Compensate, Smooth
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, llama_config, opt_config, random_model, save, some_ids

DOWN = {"llama": "mlp.down_proj", "opt": "fc2", "phi3": "mlp.down_proj", "gemma2": "mlp.down_proj"}


def facts(name: str = "llama", index: int = 0, total: int = 1) -> BlockFacts:
    layout = family_of(CONFIGS[name].model_type).layout(CONFIGS[name])
    torch.manual_seed(1)
    weights = {f"{DOWN[name]}.weight": torch.randn(6, 10)}
    return BlockFacts(layout, weights, {}, index, total)


@pytest.mark.parametrize("name", DOWN)
def test_it_is_added_to_the_last_matrix_of_the_mlp(name: str) -> None:
    given = facts(name)
    state = Compensate(rank=3).for_block(given)
    assert torch.equal(state(given.weights)[f"{DOWN[name]}.weight"], given.weights[f"{DOWN[name]}.weight"])
    with torch.no_grad():
        state.left.normal_()  # type: ignore[union-attr]
    expected = given.weights[f"{DOWN[name]}.weight"].double() + state.left.double() @ state.right.double()  # type: ignore[union-attr]
    found = state(given.weights)[f"{DOWN[name]}.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_a_scaled_matrix_is_multiplied_out() -> None:
    given = facts()
    state = Compensate().for_block(given)
    with torch.no_grad():
        state.left.normal_()  # type: ignore[union-attr]
    base, columns = given.weights["mlp.down_proj.weight"], torch.rand(10) + 0.5
    other = Scaled(torch.randn(3, 6))
    found = state({"mlp.down_proj.weight": Scaled(base, None, columns), "mlp.up_proj.weight": other})
    torch.testing.assert_close(found["mlp.down_proj.weight"], base * columns + state.left @ state.right)  # type: ignore[operator]
    assert found["mlp.up_proj.weight"] is other


@pytest.mark.parametrize(
    ("first", "last", "total", "where"),
    [(3, 4, 30, [0, 1, 2, 26, 27, 28, 29]), (0, 1, 4, [3]), (2, 0, 4, [0, 1]), (3, 4, 5, [0, 1, 2, 3, 4])],
)
def test_only_the_outer_blocks_have_it(first: int, last: int, total: int, where: list[int]) -> None:
    transform = Compensate(first=first, last=last)
    states = [transform.for_block(facts(index=index, total=total)) for index in range(total)]
    assert [index for index, state in enumerate(states) if list(state.parameters())] == where
    inner = facts(index=1, total=4)
    assert Compensate(first=1, last=1).for_block(inner)(inner.weights) is inner.weights


def test_every_component_gets_a_gradient_and_they_differ() -> None:
    given = facts()
    state = Compensate(rank=3).for_block(given)
    state(given.weights)["mlp.down_proj.weight"].square().sum().backward()
    grad: Tensor = state.left.grad  # type: ignore[union-attr,assignment]
    assert all(grad[:, k].abs().min() > 0 for k in range(3))
    assert len({tuple(grad[:, k].tolist()) for k in range(3)}) == 3
    again = Compensate(rank=3).for_block(facts())
    assert torch.equal(again.right, state.right)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [llama_config(), opt_config()], ids=["llama", "opt"])
def test_what_was_learned_is_in_the_codes(config: Any, tmp_path: Path) -> None:
    source = Checkpoint(save(random_model(config), tmp_path / "model"))
    recipe = QuantLM(
        weight=IntScheme(3),
        activation=ActivationScheme(8),
        transforms=[Smooth(sites=("qkv", "out", "qkt", "fc1", "fc2")), Compensate(rank=2, first=1, last=0)],
        objective=Reconstruction(targets=["fp", "fp_on_quantised"]),
    )
    streams = Streams(source.shell(), some_ids(), 3, torch.device("cpu"))
    block = source.block(0)
    ranges = streams.teach(block, source.layout, recipe.objective.targets)
    task = recipe.block_task(0, recipe.student(block, source), source, ranges, streams.context)
    before = task.decode(task.encode())
    batch = next(iter(streams.batches()))
    optimizer = task.configure_optimizers()
    losses = []
    for _ in range(30):
        loss, _ = task.plain_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    left, right = (task.learnables()[f"transforms.1.{name}"] for name in ("left", "right"))
    assert left.abs().max() > 0.01
    name = f"{source.layout.last}.weight"
    stored, folded = task.decode(task.encode())[name], task.folded_weights()[name]
    without = folded - left @ right
    assert (stored - folded).norm() < (stored - without).norm()
    assert not torch.equal(stored, before[name])
    assert set(task.encode()) == {key for key in task.encode() if not key.endswith(("left", "right"))}


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": 65}, {"first": -1}, {"last": -1}, {"lr": 0.0}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Compensate(**wrong)

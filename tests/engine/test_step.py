"""A step in pieces computes what Lightning's own order of things computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.engine.step import Step, StepSettings
from ptql.parts.objectives import DistributionCorrection, Reconstruction, total
from ptql.parts.transforms import BlockFacts, Compensate, Smooth, Transform, TransformState, Weights
from ptql.parts.weights import Affine
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, random_model, save, some_ids

RECIPES: dict[str, dict[str, Any]] = {
    "w3a4": {"weight": IntScheme(3, 32), "activation": ActivationScheme(4), "transforms": [Smooth()]},
    "w4a4, one shift": {
        "weight": IntScheme(4),
        "activation": ActivationScheme(4),
        "transforms": [Smooth(initial="balanced", shift="biased")],
    },
    "w2a16, symmetric": {"weight": IntScheme(2, 16, symmetric=True), "objective": Reconstruction(mse=1.0, nlc=0.0)},
    "w16a4": {"weight": IntScheme(16), "activation": ActivationScheme(4), "transforms": [Smooth()]},
    "no clipping": {
        "weight": IntScheme(4),
        "activation": ActivationScheme(8),
        "transforms": [Smooth(sites=["fc1"])],
        "weight_quantizer": Affine(clip=False),
    },
    "factors, balanced": {
        "weight": IntScheme(3, 16),
        "activation": ActivationScheme(8),
        "transforms": [Smooth()],
        "weight_quantizer": Affine(factor_rank=2),
        "objective": Reconstruction(targets=["fp", "fp_on_quantised"], balance="ema"),
    },
    "attention": {
        "weight": IntScheme(3, 16),
        "activation": ActivationScheme(8),
        "transforms": [Smooth(sites=["qkv", "out", "qkt", "fc1", "fc2"]), Compensate()],
        "objective": DistributionCorrection(akl=10.0, akl_rows=5),
    },
}


def tasks(source: Path, recipe: dict[str, Any]) -> tuple[BlockTask, BlockTask, Streams]:
    """The same block twice, for Lightning's way and for ours."""
    made = []
    checkpoint = Checkpoint(source)
    for engine in ("plain", "eager"):
        model = QuantLM(engine=engine, **recipe)
        streams = Streams(checkpoint.shell(), some_ids(samples=6, tokens=12), 2, torch.device("cpu"))
        block = checkpoint.block(0)
        ranges = streams.teach(block, checkpoint.layout, model.objective.targets, model.objective.attention)
        made.append(model.block_task(0, model.student(block, checkpoint), checkpoint, ranges, streams.context))
    return made[0], made[1], streams


def batches(streams: Streams) -> list[dict[str, Tensor]]:
    return list(streams.batches())


def gradients(task: BlockTask, step: Step) -> dict[str, Tensor]:
    places = dict(zip(map(id, step._learnables), step._grads, strict=True))
    return {name: places[id(p)].clone() for name, p in task.named_parameters() if p.requires_grad}


def close_gradients(ours: Tensor, autograd: Tensor, largest: float) -> bool:
    """Where activations are rounded, a last bit can be another code: whole gradients are compared."""
    return bool((ours - autograd).norm() <= 5e-2 * autograd.norm() + 1e-5 * largest)


def assert_gradients_of_autograd(plain: BlockTask, split: BlockTask, step: Step) -> None:
    """The step's gradients are those that `backward` has left at the same learnables of `plain`."""
    found = gradients(split, step)
    largest = max(float(g.norm()) for g in found.values())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert close_gradients(found[name], parameter.grad, largest), name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_step_is_what_autograd_and_adamw_make_of_the_same_batch(family: str, recipe: str, tmp_path: Path) -> None:
    plain, split, streams = tasks(save(random_model(CONFIGS[family]), tmp_path / family), RECIPES[recipe])
    if not plain.initial:
        pytest.skip("this family has no such sites, so there is nothing to learn")
    optimizer = plain.configure_optimizers()
    step = Step(split, split.configure_optimizers(), StepSettings())
    for batch in batches(streams):
        terms = plain.terms(batch)
        optimizer.zero_grad()
        plain.balance(total(terms), terms).backward()
        loss, ours = step.micro_batch(batch)
        torch.testing.assert_close(loss, total(terms).detach(), rtol=2e-2, atol=1e-7)
        for average, theirs in zip(split.balance.buffers(), plain.balance.buffers(), strict=True):
            torch.testing.assert_close(average, theirs, rtol=2e-2, atol=1e-7)
        assert ours.keys() == terms.keys()
        step.finish()
        found = gradients(split, step)
        largest = max(float(g.norm()) for g in found.values())
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                autograd = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                assert close_gradients(found[name], autograd, largest), name
                parameter.grad = found[name]
        optimizer.step()
        for name, value in plain.learnables().items():
            torch.testing.assert_close(split.learnables()[name], value, rtol=1e-5, atol=1e-7, msg=name)
        plain.load_learnables(split.learnables())
    assert not torch.equal(torch.cat([v.flatten() for v in split.learnables().values()]), _start(split))


def _start(task: BlockTask) -> Tensor:
    return torch.cat([value.flatten() for value in task.initial.values()])


def test_batches_of_one_step_share_its_weights_and_add_up(tmp_path: Path) -> None:
    plain, split, streams = tasks(save(random_model(CONFIGS["llama"]), tmp_path / "m"), RECIPES["w3a4"])
    optimizer = plain.configure_optimizers()
    step = Step(split, split.configure_optimizers(), StepSettings(accumulate=3))
    folds = []
    fold = step.fold
    step.fold = lambda: (folds.append(1), fold())[1]  # type: ignore[method-assign]
    for _ in range(2):
        optimizer.zero_grad()
        for batch in batches(streams):
            (total(plain.terms(batch)) / 3).backward()
            step.micro_batch(batch)
        step.finish()
        assert_gradients_of_autograd(plain, split, step)
        plain.load_learnables(split.learnables())
    assert len(folds) == 2


def test_what_is_counted_is_the_plain_sum(tmp_path: Path) -> None:
    """The balanced loss, which says nothing of progress, is differentiated and no more."""
    plain, split, streams = tasks(save(random_model(CONFIGS["llama"]), tmp_path / "m"), RECIPES["factors, balanced"])
    step, sums = Step(split, split.configure_optimizers(), StepSettings()), []
    for batch in batches(streams):
        balanced, terms = plain.plain_loss(batch)
        loss, _ = step.micro_batch(batch)
        sums.append(total(terms).item())
        assert loss.item() == pytest.approx(sums[-1], rel=1e-3)
        assert abs(balanced.item() - sums[-1]) > 0.1
    assert plain.epoch_loss.item() == pytest.approx(sum(sums), rel=1e-6)
    assert split.epoch_loss.item() == pytest.approx(sum(sums), rel=1e-3)


def test_a_step_whose_gradients_are_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    _, task, streams = tasks(save(random_model(CONFIGS["llama"]), tmp_path / "m"), RECIPES["w3a4"])
    optimizer = task.configure_optimizers()
    step = Step(task, optimizer, StepSettings())
    good, bad = batches(streams)[:2]
    bad["fp"] = bad["fp"] * float("inf")
    step.micro_batch(good)
    step.finish()
    before = {name: value.clone() for name, value in task.learnables().items()}
    moments = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    step.micro_batch(bad)
    step.finish()
    assert all(torch.equal(value, before[name]) for name, value in task.learnables().items())
    assert all(torch.equal(v, moments[p][k]) for p, state in optimizer.state.items() for k, v in state.items())
    assert step.take_skipped() == 1
    assert step.take_skipped() == 0


@pytest.mark.parametrize(("by", "most"), [("norm", 1e-3), ("value", 1e-4)])
def test_gradients_are_clipped(by: str, most: float, tmp_path: Path) -> None:
    plain, split, streams = tasks(save(random_model(CONFIGS["llama"]), tmp_path / "m"), RECIPES["w3a4"])
    step = Step(split, split.configure_optimizers(), StepSettings(clip=most, clip_by=by))  # type: ignore[arg-type]
    optimizer = plain.configure_optimizers()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in batches(streams):
        optimizer.zero_grad()
        total(plain.terms(batch)).backward()
        if by == "norm":
            torch.nn.utils.clip_grad_norm_(parameters, most)
        else:
            torch.nn.utils.clip_grad_value_(parameters, most)
        step.micro_batch(batch)
        step.finish()
        assert_gradients_of_autograd(plain, split, step)
        plain.load_learnables(split.learnables())


def test_matrices_in_bfloat16_and_float32_factors_give_the_weights_that_are_encoded(tmp_path: Path) -> None:
    """A model stored in bfloat16: the student holds it so, and rounds what float32 folding gives."""
    model = random_model(CONFIGS["llama"]).to(torch.bfloat16)
    _, task, _ = tasks(save(model, tmp_path / "m"), RECIPES["w3a4"])
    step = Step(task, task.configure_optimizers(), StepSettings())
    step.fold()
    assert task.student.get_submodule("mlp.down_proj").weight.dtype == torch.bfloat16
    decoded = task.decode(task.encode())["mlp.down_proj.weight"]
    made = step._folded[None].leaves["mlp.down_proj.weight"]
    off = ~torch.isclose(made, decoded, rtol=2e-3, atol=1e-4)  # scales are stored in float16: some codes differ
    assert off.float().mean() < 0.01


class Halved(TransformState):
    """Looks inside matrices, so it must be given tensors."""

    lr = 0.01

    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, weights: Weights) -> Weights:
        down = weights["mlp.down_proj.weight"]
        return {**weights, "mlp.down_proj.weight": torch.cat([down[:, :40], down[:, 40:] * 2 * self.share], dim=1)}


class HalfAMatrix(Transform):
    def for_block(self, facts: BlockFacts) -> TransformState:
        return Halved()


@pytest.mark.parametrize("order", [[HalfAMatrix(), Smooth()], [Smooth(), HalfAMatrix()]])
def test_transforms_that_know_tensors_only_are_given_tensors(order: list[Transform], tmp_path: Path) -> None:
    recipe = {**RECIPES["w3a4"], "transforms": order}
    plain, split, streams = tasks(save(random_model(CONFIGS["llama"]), tmp_path / "m"), recipe)
    step = Step(split, split.configure_optimizers(), StepSettings())
    batch = batches(streams)[0]
    total(plain.terms(batch)).backward()
    step.micro_batch(batch)
    step.finish()
    assert_gradients_of_autograd(plain, split, step)


def test_only_matrices_that_lose_nothing_are_held_narrow(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"])
    block = model.model.layers[0]
    for name, dtype in (("q_proj", torch.bfloat16), ("k_proj", torch.float16)):
        weight = getattr(block.self_attn, name).weight
        weight.data = weight.data.to(dtype).float()
    _, task, _ = tasks(save(model, tmp_path / "m"), RECIPES["w3a4"])
    kept = {name: task.student.get_submodule(f"self_attn.{name}_proj").weight.dtype for name in "qkv"}
    assert kept == {"q": torch.bfloat16, "k": torch.float16, "v": torch.float32}


def test_folding_is_in_float32_inside_of_a_trainers_autocast(tmp_path: Path) -> None:
    recipe = {**RECIPES["w3a4"], "transforms": [Rotates()]}
    _, task, _ = tasks(save(random_model(CONFIGS["llama"]), tmp_path / "m"), recipe)
    step = Step(task, task.configure_optimizers(), StepSettings(half=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        step.fold()
    assert task.transforms[0].seen == torch.float32


class Rotated(Halved):
    def forward(self, weights: Weights) -> Weights:
        product = weights["mlp.down_proj.weight"] @ torch.eye(80)
        self.seen = product.dtype
        return {**weights, "mlp.down_proj.weight": product * 2 * self.share}


class Rotates(Transform):
    def for_block(self, facts: BlockFacts) -> TransformState:
        return Rotated()

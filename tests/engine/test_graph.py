"""Steps as CUDA graphs: the same numbers as piece by piece, for block after block, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.engine import graph
from ptql.engine.engine import Engine
from ptql.engine.graph import GraphedStep, signature
from ptql.engine.step import Step, StepSettings
from ptql.engine.weights import attach_signed_products
from ptql.nn.quant_linear import QuantLinear
from ptql.parts.objectives import DistributionCorrection, Reconstruction
from ptql.parts.transforms import Smooth
from ptql.parts.weights import Affine, SalientBinary
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, random_model, save, some_ids

NO_GPU = not torch.cuda.is_available()
W3A4: dict[str, Any] = {"weight": IntScheme(3, 16), "activation": ActivationScheme(4), "transforms": [Smooth()]}
BALANCED: dict[str, Any] = {
    **W3A4,
    "weight_quantizer": Affine(factor_rank=2),
    "objective": Reconstruction(targets=["fp", "fp_on_quantised"], balance="ema"),
}
SALIENT: dict[str, Any] = {
    "weight": IntScheme(1, salient=0.2),
    "weight_quantizer": SalientBinary(),
    "objective": Reconstruction(targets=["fp", "fp_on_quantised"]),
}
ATTENTION: dict[str, Any] = {**W3A4, "objective": DistributionCorrection(akl=10.0, akl_rows=5, balance="ema")}


class Pretended:
    """Graphs on a CPU: a function is run in the place of its replay, and so often before as it would be."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def warm_up(self, function: Callable[[], None]) -> None:
        for _ in range(graph.WARM_UP):
            function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="no CUDA device")])]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where graphs are tested: on a GPU, or pretended on a CPU, where all but CUDA itself is the same."""
    if request.param == "cpu":
        monkeypatch.setattr(graph, "CudaGraphs", Pretended)
    return request.param


class Blocks:
    """Tasks of a tiny model's blocks, one after the other, on one device."""

    def __init__(
        self,
        folder: Path,
        family: str,
        device: str,
        dtype: torch.dtype = torch.float32,
        recipe: dict[str, Any] = W3A4,
    ) -> None:
        self.recipe = recipe
        self.source = Checkpoint(save(random_model(CONFIGS[family]).to(dtype), folder / family))
        self.device = torch.device(device)
        self.streams = Streams(self.source.shell(), some_ids(samples=5, tokens=12), 2, self.device)

    def __iter__(self) -> Iterator[BlockTask]:
        for index in range(self.source.num_blocks):
            model = QuantLM(engine="eager", **self.recipe)
            block = self.source.block(index, self.device)
            objective = model.objective
            ranges = self.streams.teach(block, self.source.layout, objective.targets, objective.attention)
            yield model.block_task(index, model.student(block, self.source), self.source, ranges, self.streams.context)
            self.streams.advance(self.streams.quantised)

    def batches(self) -> list[dict[str, Tensor]]:
        return list(self.streams.batches())


def learn(step: Step, batches: list[dict[str, Tensor]], accumulate: int = 1, epochs: int = 2) -> list[float]:
    losses = []
    for _ in range(epochs):
        for index, batch in enumerate(batches, start=1):
            losses.append(step.micro_batch(batch)[0].item())
            if index % accumulate == 0 or index == len(batches):
                step.finish()
    return losses


def trainer(**changes: Any) -> SimpleNamespace:
    usual = {
        "precision": "32-true",
        "accumulate_grad_batches": 1,
        "gradient_clip_val": None,
        "gradient_clip_algorithm": None,
        "world_size": 1,
        "is_global_zero": True,
        "callbacks": [],
    }
    return SimpleNamespace(**{**usual, **changes})


SETTINGS = {
    "one batch": StepSettings(),
    "two batches": StepSettings(accumulate=2),
    "compiled": StepSettings(compiled=True),
    "clipped": StepSettings(clip=0.1),
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_graphs_learn_what_pieces_learn_for_every_block(
    family: str, settings: str, device: str, tmp_path: Path
) -> None:
    """Five samples in batches of two: the last batch is another graph. The second block is adopted."""
    if settings == "compiled" and (family != "llama" or device == "cpu"):
        pytest.skip("compiling takes long; one family shows it")
    chosen = SETTINGS[settings]
    graphed: dict[Any, GraphedStep] = {}
    blocks, others = Blocks(tmp_path / "a", family, device), Blocks(tmp_path / "b", family, device)
    for task, other in zip(blocks, others, strict=True):
        optimizer, their_optimizer = task.configure_optimizers(), other.configure_optimizers()
        key = signature(task, optimizer, chosen)
        if key in graphed:
            graphed[key].adopt(task, optimizer)
        else:
            graphed[key] = GraphedStep(task, optimizer, chosen)
        eager = Step(other, their_optimizer, replace(chosen, compiled=False))
        losses = learn(graphed[key], blocks.batches(), chosen.accumulate)
        expected = learn(eager, others.batches(), chosen.accumulate)
        assert losses[0] == pytest.approx(expected[0], rel=1e-3)
        assert losses == pytest.approx(expected, rel=0.1)  # a last bit can be another code, and more so later
        assert graphed[key].epoch_loss.item() == pytest.approx(sum(losses), rel=1e-4)
        steps = math.ceil(3 / chosen.accumulate) * 2
        for parameter, state in optimizer.state.items():
            assert state["step"].item() == steps
            assert state["exp_avg"].shape == parameter.shape
        moved = [(task.learnables()[n].cpu() - start.cpu()).abs().max().item() for n, start in task.initial.items()]
        assert max(moved) > 0
        if device == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # as Lightning does at the end of each fit
            torch.cuda.empty_cache()
        for name, value in other.learnables().items():
            ours, start = task.learnables()[name], other.initial[name].to(value.device)
            assert (ours - value).norm() <= 0.5 * (value - start).norm() + 1e-4, name
    assert len(graphed) == (2 if family == "gemma2" else 1)  # its blocks are of two kinds, turn by turn


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_carry_factors_and_running_averages(device: str, compiled: bool, tmp_path: Path) -> None:
    """Averages of each block are its own: the second block, adopted, begins anew."""
    if compiled and device == "cpu":
        pytest.skip("compiling takes long; a GPU shows it")
    made = []
    for name, kind in (("a", GraphedStep), ("b", Step)):
        blocks, step, found = Blocks(tmp_path / name, "llama", device, recipe=BALANCED), None, []
        for task in blocks:
            optimizer = task.configure_optimizers()
            if isinstance(step, GraphedStep):
                step.adopt(task, optimizer)
            else:
                step = kind(task, optimizer, StepSettings(compiled=compiled and kind is GraphedStep))
            assert not task.balance.averages.any()
            losses = learn(step, blocks.batches()[:1], epochs=1)
            first = task.balance.averages.sum().item()  # each average is its first value
            assert first == pytest.approx(losses[0], rel=1e-5)
            losses += learn(step, blocks.batches(), epochs=2)
            assert any(
                (value - task.initial[n].to(device)).any() for n, value in task.learnables().items() if "left" in n
            )
            found.append((losses, task.balance.averages.tolist()))
        made.append(found)
    for (losses, averages), (expected, theirs) in zip(*made, strict=True):
        assert losses[0] == pytest.approx(expected[0], rel=1e-3)
        assert losses == pytest.approx(expected, rel=0.1)
        assert averages == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_graphs_look_at_attention_as_pieces_do(
    family: str, half: torch.dtype | None, compiled: bool, device: str, tmp_path: Path
) -> None:
    """The first step of each block, before last bits become other codes; Llama's second block is adopted."""
    if device == "cpu" and (compiled or half is not None):
        pytest.skip("compiling takes long; a GPU shows it")
    graphed: dict[Any, GraphedStep] = {}
    blocks, others = (Blocks(tmp_path / name, family, device, recipe=ATTENTION) for name in "ab")
    for task, other in zip(blocks, others, strict=True):
        optimizer, settings = task.configure_optimizers(), StepSettings(half=half, compiled=compiled)
        key = signature(task, optimizer, settings)
        if key in graphed:
            graphed[key].adopt(task, optimizer)
        else:
            graphed[key] = GraphedStep(task, optimizer, settings)
        eager = Step(other, other.configure_optimizers(), StepSettings(half=half))
        batch, same = blocks.batches()[0], others.batches()[0]
        assert torch.equal(batch["attention"], same["attention"])
        (loss, terms), (expected, theirs) = graphed[key].micro_batch(batch), eager.micro_batch(same)
        rel = 1e-3 if half is None else 3e-2
        assert loss.item() == pytest.approx(expected.item(), rel=rel)
        assert terms.keys() == theirs.keys()
        assert terms["akl"].item() == pytest.approx(theirs["akl"].item(), rel=rel)
        assert terms["akl"] > 1e-2
        graphed[key].finish()
        eager.finish()
        ours, gradient = graphed[key]._flat, eager._flat
        assert (ours - gradient).norm() < (5e-2 if half is None else 0.5) * gradient.norm()
        learn(graphed[key], blocks.batches(), epochs=1)
        assert graphed[key].take_skipped() == 0
        assert task.probe is not None
        assert task.probe._seen is None
    assert len(graphed) == (2 if family == "gemma2" else 1)


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_adopted_block_has_signs_and_salient_channels_of_its_own(
    family: str, half: torch.dtype | None, faithful: bool, device: str, tmp_path: Path
) -> None:
    recipe = {**SALIENT, "weight_quantizer": SalientBinary(faithful=faithful)}
    graphed: dict[Any, GraphedStep] = {}
    blocks, others = (Blocks(tmp_path / name, family, device, recipe=recipe) for name in "ab")
    for task, other in zip(blocks, others, strict=True):
        optimizer, settings = task.configure_optimizers(), StepSettings(half=half)
        attach_signed_products(task, half or torch.float32)  # the other writes its matrices out
        assert all(m.signed is not None for m in task.student.modules() if isinstance(m, QuantLinear))
        key = signature(task, optimizer, settings)
        if key in graphed:
            graphed[key].adopt(task, optimizer)
        else:
            graphed[key] = GraphedStep(task, optimizer, settings)
        eager = Step(other, other.configure_optimizers(), settings)
        batch, same = blocks.batches()[0], others.batches()[0]
        (loss, _), (expected, _) = graphed[key].micro_batch(batch), eager.micro_batch(same)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3 if half is None else 3e-2)
        graphed[key].finish()
        eager.finish()
        ours, gradient = graphed[key]._flat, eager._flat
        if half is None:
            assert (ours - gradient).norm() < 1e-2 * gradient.norm()
        else:  # by its direction: where the mean cosine is near 0, its logarithm magnifies what half precision loses
            assert torch.cosine_similarity(ours, gradient, 0) > 0.98
    assert len(graphed) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "recipe", [W3A4, BALANCED, ATTENTION, SALIENT], ids=["usual", "balanced", "attention", "salient"]
)
def test_a_step_does_not_wait_for_the_device(recipe: dict[str, Any], tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, "llama", "cuda", recipe=recipe)
    task = next(iter(blocks))
    attach_signed_products(task, torch.bfloat16)
    step = GraphedStep(task, task.configure_optimizers(), StepSettings(half=torch.bfloat16))
    batches = blocks.batches()
    learn(step, batches, epochs=1)
    before = step.epoch_loss.item()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step.micro_batch(batch)
            step.finish()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.epoch_loss.item() > before


def test_graphs_follow_learning_rates_that_change(device: str, tmp_path: Path) -> None:
    made = []
    for name, kind in (("a", GraphedStep), ("b", Step)):
        blocks = Blocks(tmp_path / name, "llama", device)
        task = next(iter(blocks))
        optimizer = task.configure_optimizers()
        step = kind(task, optimizer, StepSettings())
        learn(step, blocks.batches(), epochs=1)
        for group in optimizer.param_groups:
            group["lr"] *= 10
        learn(step, blocks.batches(), epochs=1)
        made.append({n: (v - task.initial[n].to(v.device)).norm() for n, v in task.learnables().items()})
    for name, moved in made[1].items():
        assert made[0][name].item() == pytest.approx(moved.item(), rel=0.5, abs=1e-3), name


def test_skipped_steps_are_counted_by_graphs_too(device: str, tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, "llama", device)
    task = next(iter(blocks))
    step = GraphedStep(task, task.configure_optimizers(), StepSettings())
    good, bad = blocks.batches()[:2]
    bad = {**bad, "fp": bad["fp"] * float("inf")}
    learn(step, [good, bad, good], epochs=1)
    assert step.take_skipped() == 1
    assert all(value.isfinite().all() for value in task.learnables().values())


def test_what_cannot_be_captured_goes_on_piece_by_piece(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = Blocks(tmp_path, "llama", device)
    task = next(iter(blocks))
    start = {name: value.clone() for name, value in task.learnables().items()}

    def fail(*args: Any) -> None:
        raise RuntimeError("no graph today\nand more")

    monkeypatch.setattr(graph.CudaGraphs, "capture", fail)
    monkeypatch.setattr(Engine, "kernels", lambda *args: True)
    engine, optimizer = Engine("auto"), task.configure_optimizers()
    monkeypatch.setattr(Engine, "settings", lambda *args: StepSettings())
    task._engine, task._step = engine, engine.step(task, optimizer, trainer())
    monkeypatch.setattr(type(task), "trainer", SimpleNamespace(optimizers=[optimizer], **vars(trainer())))
    assert isinstance(task._step, GraphedStep)
    capsys.readouterr()
    loss, _ = task._captured_loss(blocks.batches()[0])
    assert loss.isfinite()
    assert task.epoch_loss.item() == loss.item()
    assert type(task._step) is Step
    assert all(torch.equal(value, start[name]) for name, value in task.learnables().items())
    assert capsys.readouterr().err == "ptql: engine: eager, as the step can't be captured (no graph today)\n"
    assert type(engine.step(task, task.configure_optimizers(), trainer())) is Step


def test_a_shorter_last_batch_that_cannot_be_captured_loses_nothing(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are learned by graphs, the third and all later ones piece by piece; as if it had always been so."""
    ends = []
    for name, kind in (("a", GraphedStep), ("b", Step)):
        blocks = Blocks(tmp_path / name, "llama", device)
        task, optimizer = next(iter(blocks)), None
        optimizer = task.configure_optimizers()
        engine = Engine("auto")
        monkeypatch.setattr(Engine, "settings", lambda *args: StepSettings())
        task._engine, task._step = engine, kind(task, optimizer, StepSettings())
        with monkeypatch.context() as patch:
            patch.setattr(type(task), "trainer", SimpleNamespace(optimizers=[optimizer], **vars(trainer())))
            for index, batch in enumerate(blocks.batches()):
                if index == 2 and kind is GraphedStep:
                    patch.setattr(graph.CudaGraphs, "capture", lambda *args: 1 / 0)
                task._captured_loss(batch)
                assert task._step is not None
                task._step.finish()
        assert type(task._step) is Step
        ends.append((task.learnables(), task.epoch_loss.item(), [s["step"].item() for s in optimizer.state.values()]))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-3)
    assert ends[0][2] == ends[1][2]
    for name, value in ends[1][0].items():
        torch.testing.assert_close(ends[0][0][name], value, rtol=1e-2, atol=1e-2, msg=name)


# What needs no GPU


def test_blocks_of_one_shape_have_one_signature_and_others_another(tmp_path: Path) -> None:
    def signatures(family: str) -> list[Any]:
        made = []
        for task in Blocks(tmp_path / family, family, "cpu"):
            made.append(signature(task, task.configure_optimizers(), StepSettings()))
        return made

    llama, gemma, wide = signatures("llama"), signatures("gemma2"), signatures("llama_head_dim")
    assert len(set(llama)) == 1
    assert len(set(gemma)) == 2
    assert llama[0] != wide[0]
    task = next(iter(Blocks(tmp_path / "again", "llama", "cpu")))
    optimizer = task.configure_optimizers()
    assert signature(task, optimizer, StepSettings()) == llama[0]
    assert signature(task, optimizer, StepSettings(accumulate=2)) != llama[0]
    optimizer.param_groups[0]["lr"] *= 2  # read by the device in each step
    assert signature(task, optimizer, StepSettings()) == llama[0]
    optimizer.param_groups[0]["weight_decay"] = 0.1
    assert signature(task, optimizer, StepSettings()) != llama[0]
    task.balance = Reconstruction(balance="ema").balance_for_block()
    assert signature(task, task.configure_optimizers(), StepSettings()) != llama[0]
    task.balance = Reconstruction().balance_for_block()
    task.quantizers["mlp/down_proj"].scheme = IntScheme(4, 16)
    assert signature(task, task.configure_optimizers(), StepSettings()) != llama[0]


def test_blocks_that_are_looked_at_otherwise_have_another_signature(tmp_path: Path) -> None:
    def found(name: str, **settings: Any) -> Any:
        recipe = {**W3A4, "objective": DistributionCorrection(**settings)}
        task = next(iter(Blocks(tmp_path / name, "llama", "cpu", recipe=recipe)))
        task.objective = Reconstruction()  # what is told apart is the probe
        return signature(task, task.configure_optimizers(), StepSettings())

    rows = found("a", akl_rows=5)
    assert found("b", akl_rows=5) == rows
    others = [found("c", akl_rows=6), found("d", akl_rows=5, akl_heads="mean"), found("e", akl=0.0)]
    assert len({rows, *others}) == 4


class Looks:
    def on_before_optimizer_step(self) -> None:
        return None


@pytest.mark.parametrize(
    ("optimizer", "changes", "reason"),
    [
        (SGD, {}, "plain, as the optimiser SGD needs the host in each step"),
        (torch.optim.AdamW, {"precision": "16-mixed"}, "plain, as 16-mixed scales its losses on the host"),
        (torch.optim.AdamW, {"callbacks": [Looks()]}, "plain, as Looks.on_before_optimizer_step looks inside a step"),
    ],
)
def test_what_needs_lightnings_order_of_things_is_plain_and_said_once(
    optimizer: type[Optimizer],
    changes: dict[str, Any],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = next(iter(Blocks(tmp_path, "llama", "cpu")))
    engine = Engine("eager")
    made = optimizer([p for p in task.parameters() if p.requires_grad], lr=0.1)
    capsys.readouterr()
    for _ in range(2):
        assert engine.step(task, made, trainer(**changes)) is None
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_on_a_cpu_auto_is_plain_and_eager_is_eager(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = next(iter(Blocks(tmp_path, "llama", "cpu")))
    capsys.readouterr()
    assert Engine("auto").step(task, task.configure_optimizers(), trainer()) is None
    assert type(Engine("eager").step(task, task.configure_optimizers(), trainer())) is Step
    assert Engine("plain").step(task, task.configure_optimizers(), trainer()) is None
    assert capsys.readouterr().err == ""


def test_what_a_trainer_says_of_a_step() -> None:
    said = Engine("eager").settings(
        trainer(precision="bf16-mixed", accumulate_grad_batches=4, gradient_clip_val=0.5, world_size=2)
    )
    assert said == StepSettings(torch.bfloat16, 4, 0.5, "norm", 2)
    by_value = trainer(gradient_clip_val=0.5, gradient_clip_algorithm="value")
    assert Engine("auto").settings(by_value) == StepSettings(clip=0.5, clip_by="value", compiled=True)

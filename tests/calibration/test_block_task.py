"""One block's task: pure weights, what it stores, skipped steps, the best epoch, and the fall-back."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PretrainedConfig

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.finish import finish_block
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.functional.losses import mean_squared_error
from ptql.nn.student import call_block, run_block, weights_of
from ptql.parts.inputs import InputRange
from ptql.parts.objectives import Objective, Reconstruction, Target, Targets
from ptql.parts.transforms import Smooth
from ptql.parts.weights import Affine
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import llama_config, opt_config, random_model, save, some_ids

CONFIGS: dict[str, PretrainedConfig] = {"llama": llama_config(), "opt": opt_config()}
W3A4: dict[str, Any] = {"weight": IntScheme(3, 32), "activation": ActivationScheme(4)}


@dataclass
class Prepared:
    """A task with the streams and the source that it was made of."""

    task: BlockTask
    streams: Streams
    source: Checkpoint
    ranges: dict[str, InputRange]

    def finish(self) -> Finished:
        record, output = finish_block(self.task, self.streams, self.source.layout, self.ranges)
        return Finished(record.stored, record.learned, record.ranges, record.summary, output)


@dataclass
class Finished:
    """What `finish_block` returns, in one."""

    stored: dict[str, Tensor]
    learned: dict[str, Tensor]
    ranges: dict[str, Tensor]
    summary: dict[str, Any]
    output: Tensor


class Prepare:
    """Makes the task of block 0 of a tiny model: LRQuant's parts unless told otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0

    def __call__(self, name: str = "llama", dtype: torch.dtype = torch.float32, **recipe: Any) -> Prepared:
        self.made += 1
        directory = save(random_model(CONFIGS[name]).to(dtype), self.folder / f"{name}{self.made}")
        model = QuantLM(**{"transforms": [Smooth()], **W3A4, **recipe})
        source = Checkpoint(directory)
        streams = Streams(source.shell(), some_ids(samples=5, tokens=12), 2, torch.device("cpu"))
        block = source.block(0)
        ranges = streams.teach(block, source.layout, model.objective.targets)
        task = model.block_task(0, model.student(block, source), source, ranges, streams.context)
        return Prepared(task, streams, source, ranges)


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    return Prepare(tmp_path)


def fit(
    task: BlockTask,
    batches: Any,
    epochs: int = 1,
    callbacks: list[Callback] | None = None,
    **options: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(task, train_dataloaders=batches)
    return trainer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Weights


@pytest.mark.parametrize("name", CONFIGS)
def test_effective_weights_are_a_pure_function(prepare: Prepare, name: str) -> None:
    made = prepare(name)
    frozen = {k: w.clone() for k, w in weights_of(made.task.student).items()}
    learned = {k: w.clone() for k, w in made.task.learnables().items()}
    first, again = made.task.effective_weights(), made.task.effective_weights()
    assert same(first, again)
    assert same(weights_of(made.task.student), frozen)
    assert same(made.task.learnables(), learned)
    assert first.keys() == frozen.keys()
    assert all(first[f"{n}.weight"].requires_grad for n in made.source.layout.names)
    fit(made.task, made.streams.batches(), epochs=2)
    assert same(weights_of(made.task.student), frozen)
    assert not same(made.task.learnables(), learned)
    made.task.load_learnables(learned)
    assert same(made.task.effective_weights(), first)


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_weights_are_the_full_precision_function(prepare: Prepare, name: str) -> None:
    made = prepare(name, activation=ActivationScheme(16), transforms=[Smooth(when="always")])
    output = made.streams.output(made.task.student, made.task.folded_weights())
    torch.testing.assert_close(output, made.streams.targets["fp"], rtol=1e-4, atol=1e-4)


def test_effective_weights_are_rounded_folded_weights(prepare: Prepare) -> None:
    task = prepare().task
    folded, effective = task.folded_weights(), task.effective_weights()
    for name, w in folded.items():
        layer = name.removesuffix(".weight").replace(".", "/")
        if layer in task.quantizers:
            assert torch.equal(effective[name], task.quantizers[layer].fake(w))
            assert not torch.equal(effective[name], w)
            assert all(len(group.unique()) <= 8 for group in effective[name][:, :32])
        else:
            assert torch.equal(effective[name], w)


def test_sixteen_bits_leave_the_weights_alone(prepare: Prepare) -> None:
    made = prepare(weight=IntScheme(16), transforms=[])
    assert len(made.task.quantizers) == 0
    assert same(made.task.effective_weights(), weights_of(made.source.block(0)))
    assert made.task.learnables() == {}
    assert same(made.task.decode(made.task.encode()), weights_of(made.source.block(0)))
    sixteen = prepare(weight=IntScheme(16), activation=ActivationScheme(16), transforms=[])
    finished = sixteen.finish()
    assert torch.equal(finished.output, sixteen.streams.targets["fp"])
    assert finished.summary["mse"] == 0


def test_the_state_holds_the_learnables_only(prepare: Prepare) -> None:
    made = prepare()
    assert same(made.task.state_dict(), made.task.learnables())
    names = set(made.task.learnables())
    assert len(names) == 7 + 2 * 7  # smoothing's scales and shifts; two clipping logits for each of seven matrices
    assert not any(name.startswith("student") for name in names)
    assert all(t.dtype == torch.float32 for t in made.task.learnables().values())
    other = prepare().task
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1
    other.load_state_dict(made.task.state_dict(), strict=False)
    assert same(other.learnables(), made.task.learnables())


def test_initial_values_are_a_copy(prepare: Prepare) -> None:
    made = prepare()
    fit(made.task, made.streams.batches())
    assert same(made.task.initial, prepare().task.initial)
    assert not same(made.task.initial, made.task.learnables())


# What is stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_decoded_weights_are_what_was_encoded(prepare: Prepare, name: str, dtype: torch.dtype) -> None:
    made = prepare(name, dtype)
    fit(made.task, made.streams.batches())
    task, stored = made.task, made.task.encode()
    decoded, folded, effective = task.decode(stored), task.folded_weights(), task.effective_weights()
    assert set(decoded) == {n for n, _ in task.student.named_parameters()}
    assert all(w.dtype == torch.float32 and not w.requires_grad for w in decoded.values())
    for parameter, w in decoded.items():
        layer, _, kind = parameter.rpartition(".")
        if layer.replace(".", "/") not in task.quantizers:
            assert torch.equal(w, folded[parameter])  # norms: as they were learned
        elif kind == "bias":
            assert torch.equal(w, folded[parameter].half().float())
        else:
            quantizer = task.quantizers[layer.replace(".", "/")]
            assert torch.equal(w, quantizer.decode(quantizer.encode(folded[parameter])))
            trained = effective[parameter]
            step = (trained.amax(1) - trained.amin(1)) / 2  # more than any group's step
            assert ((w - trained).abs().amax(1) <= step).all()
            assert (w - trained).abs().mean() < 0.01 * trained.abs().mean()
    before = {k: t.clone() for k, t in stored.items()}
    task.decode(stored)
    assert same(stored, before)


def test_matrices_that_stay_keep_the_sources_dtype_and_vectors_float32(prepare: Prepare) -> None:
    stored = prepare("opt", torch.bfloat16, weight=IntScheme(16)).task.encode()
    assert {t.dtype for t in stored.values() if t.ndim > 1} == {torch.bfloat16}
    assert {t.dtype for t in stored.values() if t.ndim == 1} == {torch.float32}


def test_a_bias_that_float16_does_not_hold_stays_float32(prepare: Prepare) -> None:
    made = prepare("opt", transforms=[])
    bias = made.task.student.get_submodule("fc1").bias
    bias[3] = 1e5
    stored = made.task.encode()
    assert stored["fc1.bias"].dtype == torch.float32
    assert stored["fc2.bias"].dtype == torch.float16
    assert made.task.decode(stored)["fc1.bias"][3] == 1e5


# Learning


def test_the_loss_of_a_step_is_the_objective_on_effective_weights(prepare: Prepare) -> None:
    objective = Reconstruction(mse=2.0, nlc=0.5, targets=("fp", "fp_on_quantised"))
    made = prepare(objective=objective)
    losses: list[float] = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())
            logged.update({k: v.item() for k, v in trainer.callback_metrics.items()})

    logged: dict[str, float] = {}
    batch = next(iter(made.streams.batches()))
    output = call_block(made.task.student, batch["input"], made.streams.context, made.task.effective_weights())
    terms = objective.terms(output, {"fp": batch["fp"], "fp_on_quantised": batch["fp_on_quantised"]})
    fit(made.task, OneByOne([batch]), callbacks=[Note()], log_every_n_steps=1)
    assert losses == pytest.approx([sum(terms.values()).item()], rel=1e-6)
    assert logged == pytest.approx(
        {**{f"loss/{k}": v.item() for k, v in terms.items()}, "loss/total": losses[0]}, rel=1e-6
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_stays_off_while_learning(prepare: Prepare, name: str) -> None:
    made = prepare(name)
    seen: list[bool] = []

    class Note(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            student = made.task.student
            seen.extend([student.training, student.get_submodule("self_attn").training])

    fit(made.task, made.streams.batches(), callbacks=[Note()])
    assert seen == [False] * 6


@pytest.mark.parametrize("name", CONFIGS)
def test_learning_lowers_the_loss_of_the_encoded_block(prepare: Prepare, name: str) -> None:
    made = prepare(name)
    fit(made.task, made.streams.batches(), epochs=10)
    finished = made.finish()
    assert finished.summary["loss"] < 0.99 * finished.summary["loss_start"]
    assert finished.summary["fell_back"] is False
    assert finished.summary["skipped_steps"] == 0
    assert same(finished.learned, made.task.learnables())


def test_the_same_run_ends_in_the_same_bits(prepare: Prepare) -> None:
    ends = []
    for _ in range(2):
        made = prepare("opt")
        fit(made.task, made.streams.batches(), epochs=2)
        ends.append(made.task.encode())
    assert same(*ends)


@pytest.mark.parametrize(("clip_rate", "groups"), [(1e-2, 2), (1e-3, 1)])
def test_every_part_learns_at_its_own_rate(prepare: Prepare, clip_rate: float, groups: int) -> None:
    task = prepare(transforms=[Smooth(lr=1e-3)], weight_quantizer=Affine(lr=clip_rate)).task
    optimizer = task.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert len(optimizer.param_groups) == groups
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(task.learnables()) == 21
    for name, p in task.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == (1e-3 if name.startswith("transforms.") else clip_rate)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_parts_without_learnables_make_no_group(prepare: Prepare) -> None:
    optimizer = prepare(weight_quantizer=Affine(clip=False)).task.configure_optimizers()
    assert [len(group["params"]) for group in optimizer.param_groups] == [7]


# Steps that are not finite


class OneByOne:
    """Given batches, in order."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


Poison = Literal["loss", "gradient"]


class Poisoned(Objective):
    """MSE; at some calls the loss, or only its gradient, is not a number."""

    targets: tuple[Target, ...] = ("fp",)

    def __init__(self, poison: Poison, at: set[int]) -> None:
        self.poison, self.at, self.calls = poison, at, 0

    def terms(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        loss = mean_squared_error(output, targets["fp"])
        self.calls += 1
        if self.calls - 1 in self.at:
            zero = (output - output.detach()).abs().sqrt().sum()  # whose gradient is 0 * inf
            loss = loss + (zero if self.poison == "gradient" else loss * float("nan"))
        return {"mse": loss}


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_touches_nothing(prepare: Prepare, poison: Poison) -> None:
    made = prepare(objective=Poisoned(poison, at={0, 1, 2}))
    trainer = fit(made.task, made.streams.batches())
    assert made.task.skipped_steps == 3
    assert same(made.task.learnables(), made.task.initial)
    assert len(trainer.optimizers[0].state) == 0


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_skipped_step_is_as_if_its_batch_were_not_there(prepare: Prepare, poison: Poison) -> None:
    made, without = prepare(objective=Poisoned(poison, at={1})), prepare(objective=Poisoned(poison, at=set()))
    trainer = fit(made.task, made.streams.batches())
    first, _, last = without.streams.batches()
    reference = fit(without.task, OneByOne([first, last]))
    assert (made.task.skipped_steps, without.task.skipped_steps) == (1, 0)
    assert same(made.task.learnables(), without.task.learnables())
    assert not same(made.task.learnables(), made.task.initial)
    states = [list(t.optimizers[0].state.values()) for t in (trainer, reference)]
    assert len(states[0]) == 21
    for mine, theirs in zip(*states, strict=True):
        assert mine["step"] == theirs["step"] == 2
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
        assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])


def test_skipped_steps_are_told(prepare: Prepare) -> None:
    made = prepare(objective=Poisoned("gradient", at={1, 4}))
    fit(made.task, made.streams.batches(), epochs=2)
    assert made.finish().summary["skipped_steps"] == 2


# The best epoch


class Scheduled(Objective):
    """MSE, plus a constant for each epoch of three steps, which has no gradient."""

    targets: tuple[Target, ...] = ("fp",)

    def __init__(self, extra: list[float]) -> None:
        self.extra, self.calls = extra, 0

    def terms(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        extra = self.extra[min(self.calls // 3, len(self.extra) - 1)]
        self.calls += 1
        return {"mse": mean_squared_error(output, targets["fp"]) + extra}


class Snapshots(Callback):
    """The learnables at the end of every epoch."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, BlockTask)
        self.taken.append(copy.deepcopy(module.learnables()))


@pytest.mark.parametrize(
    ("extra", "best"),
    [([1e3, 0.0, 1e4, 1e5], 1), ([0.0, 1e3, 1e3], 0), ([3e3, 2e3, 1e3], 2), ([math.nan, 0.0, math.nan], 1)],
)
def test_the_learnables_of_the_best_epoch_are_kept(prepare: Prepare, extra: list[float], best: int) -> None:
    made, snapshots = prepare(objective=Scheduled(extra)), Snapshots()
    fit(made.task, made.streams.batches(), len(extra), [snapshots])
    assert [same(made.task.learnables(), taken) for taken in snapshots.taken] == [k == best for k in range(len(extra))]


def test_without_a_finite_epoch_the_last_learnables_stay(prepare: Prepare) -> None:
    made, snapshots = prepare(objective=Scheduled([math.nan])), Snapshots()
    fit(made.task, made.streams.batches(), 2, [snapshots])
    assert same(made.task.learnables(), snapshots.taken[-1])


class Zeroing(torch.optim.Optimizer):
    """Steps to zero, where no smoothing scale may stay."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.zero_()
        return loss


def test_scales_are_projected_before_each_step(prepare: Prepare) -> None:
    made = prepare(optimizer=Zeroing)
    fit(made.task, made.streams.batches())
    assert made.task.skipped_steps == 0  # the second step did not divide by zero
    assert math.isfinite(made.task.epoch_loss.item())


def test_the_scales_that_are_kept_are_projected(prepare: Prepare) -> None:
    made = prepare(optimizer=Zeroing)
    fit(made.task, made.streams.batches())
    scales = [t for name, t in made.task.learnables().items() if name.endswith("scale")]
    assert all((s.abs() >= 0.99e-2).all() for s in scales)
    assert all(t.isfinite().all() for t in made.task.encode().values() if t.is_floating_point())


# The end of a block


def awful(task: BlockTask) -> dict[str, Tensor]:
    """Learnables under which every group is clipped to nothing."""
    values = {name: -8.0 if "quantizers" in name else 1.0 for name in task.learnables()}
    return {name: torch.full_like(t, values[name]) for name, t in task.learnables().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_learned_is_dropped_where_the_start_is_better(prepare: Prepare, name: str) -> None:
    made, untouched = prepare(name), prepare(name)
    made.task.load_learnables(awful(made.task))
    finished, start = made.finish(), untouched.finish()
    assert finished.summary["fell_back"] is True
    assert finished.summary["loss"] == finished.summary["loss_start"] == start.summary["loss"]
    assert same(finished.learned, made.task.initial)
    assert same(made.task.learnables(), made.task.initial)
    assert same(finished.stored, start.stored)
    assert torch.equal(finished.output, start.output)


def test_learnables_that_are_not_finite_are_dropped(prepare: Prepare) -> None:
    made = prepare()
    made.task.load_learnables({name: t * math.nan for name, t in made.task.learnables().items()})
    finished = made.finish()
    assert finished.summary["fell_back"] is True
    assert math.isfinite(finished.summary["loss"])
    assert finished.output.isfinite().all()


def test_a_draw_is_no_fall_back(prepare: Prepare) -> None:
    made = prepare()
    finished = made.finish()
    assert finished.summary["fell_back"] is False
    assert finished.summary["loss"] == finished.summary["loss_start"]


def test_what_was_learned_is_still_there_afterwards(prepare: Prepare) -> None:
    made = prepare()
    fit(made.task, made.streams.batches(), epochs=10)
    learned = copy.deepcopy(made.task.learnables())
    finished = made.finish()
    assert finished.summary["fell_back"] is False
    assert same(finished.learned, learned)
    assert same(made.task.learnables(), learned)
    assert same(finished.stored, made.task.encode())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shift", ["none", "all"])
def test_the_output_is_that_of_the_stored_block(prepare: Prepare, name: str, shift: Any) -> None:
    made = prepare(name, transforms=[Smooth(shift=shift)])
    fit(made.task, made.streams.batches(), epochs=2)
    finished, task = made.finish(), made.task
    decoded = task.decode(finished.stored)
    again = run_block(task.student, made.streams.quantised, made.streams.context, 2, decoded)
    assert torch.equal(finished.output, again)
    # The same through modules that hold the decoded weights, without functional_call.
    holder = copy.deepcopy(task.student)
    for parameter, p in holder.named_parameters():
        p.data = decoded[parameter]
    assert torch.equal(run_block(holder, made.streams.quantised, made.streams.context, 2), finished.output)


def test_the_summary_is_the_objective_and_the_mse_of_the_stored_block(prepare: Prepare) -> None:
    made = prepare(objective=Reconstruction(mse=0.0, nlc=3.0, targets=("fp", "fp_on_quantised")))
    finished = made.finish()
    targets, terms = made.streams.targets, []
    for start in range(0, 5, 2):  # the last batch has one sample
        part = slice(start, start + 2)
        output = finished.output[part].double()
        for target in ("fp", "fp_on_quantised"):
            cosine = nn.functional.cosine_similarity(output, targets[target][part].double(), dim=-1)
            terms.append(-3 * math.log(cosine.mean().item()))
    assert finished.summary["loss"] == pytest.approx(sum(terms) / 3, rel=1e-4)
    mse = (finished.output.double() - targets["fp"].double()).square().mean().item()
    assert finished.summary["mse"] == pytest.approx(mse, rel=1e-5)


def test_a_block_without_learnables_is_encoded_once(prepare: Prepare) -> None:
    made = prepare(transforms=[], weight_quantizer=Affine(clip=False))
    finished = made.finish()
    assert finished.learned == {}
    assert finished.summary["fell_back"] is False
    assert finished.summary["loss_start"] == finished.summary["loss"] > 0
    assert json.loads(json.dumps(finished.summary)) == finished.summary
    assert "best_epoch" not in finished.summary


def test_the_summary_tells_the_error_of_each_matrix_and_the_best_epoch(prepare: Prepare) -> None:
    made = prepare()
    fit(made.task, made.streams.batches(), epochs=3)
    finished = made.finish()
    folded, decoded = made.task.folded_weights(), made.task.decode(finished.stored)
    assert finished.summary["layers"].keys() == set(made.source.layout.names)
    for name, error in finished.summary["layers"].items():
        w, rounded = folded[f"{name}.weight"].double(), decoded[f"{name}.weight"].double()
        assert error == pytest.approx(((w - rounded) ** 2).sum().item() / (w**2).sum().item(), rel=1e-5)
        assert 0 < error < 1
    assert finished.summary["best_epoch"] in (0, 1, 2)
    assert finished.summary["loss_learned"] == made.task.best_loss > 0


def test_the_ranges_are_those_before_and_after_smoothing(prepare: Prepare) -> None:
    made = prepare(transforms=[Smooth(initial="ones", shift="none")])
    finished = made.finish()
    firsts = {group[0] for group in made.source.layout.linears}
    assert finished.ranges.keys() == {f"{when}.{name}" for name in firsts for when in ("before", "after", "mean")}
    hidden = made.streams.quantised  # of block 0: the embeddings, in both streams
    norm = made.source.block(0).get_submodule("input_layernorm")
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    peak = norm(hidden).abs().flatten(0, 1).amax(0)
    close(finished.ranges["before.self_attn.q_proj"], peak)
    close(finished.ranges["after.self_attn.q_proj"], peak)  # nothing is smoothed yet
    made = prepare(transforms=[Smooth(initial="log", shift="none")])
    scale = made.task.learnables()["transforms.0.sites.0.scale"]
    smoothed = made.finish()
    close(smoothed.ranges["before.self_attn.q_proj"], peak)
    close(smoothed.ranges["after.self_attn.q_proj"], peak / scale)

"""One block of a finished run that learns again: on a text under test, from where calibration ended."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor

from ptql.calibration.block_task import BlockTask
from ptql.engine.step import CaptureError, Step
from ptql.evaluation.recorded_run import RecordedRun
from ptql.nn.student import call_block, run_block
from ptql.nn.transfer import batches_on
from ptql.parts.objectives import Objective, Targets, all_terms, total
from ptql.parts.transforms import Weights
from ptql.recipe import UNQUANTISED, ActivationScheme

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer

Compat = Literal["none", "rlq"]


@dataclass(frozen=True)
class Lesson:
    """How a block learns again.

    Args:
        objective: What its output is compared by; one that does not look at attention.
        epochs: Passes over what it learns on.
        batch_size: Windows of a step.
        lr: Of scales and shifts; None for the recipe's.
        weight_lr: Of what weight quantisers learn; None for the recipe's.
        compat: `rlq` begins anew (scales 1, shifts 0, clipping as at the start) and rounds no activations in this
            block, as the original's code does.
    """

    objective: Objective
    epochs: int = 5
    batch_size: int = 1
    lr: float | None = None
    weight_lr: float | None = None
    compat: Compat = "none"


class Pupil:
    """A block with its full-precision teacher. The run's files are only read.

    Args:
        run: Of the block.
        index: Of the block, from 0.
        context: Keyword arguments of the block.
        lesson: How it learns.
        trainer: Says how steps are computed: precision, clipping of gradients.
        device: Where.
        captured: Whether steps may be captured; then one pupil at a time learns.
    """

    def __init__(
        self,
        run: RecordedRun,
        index: int,
        context: dict[str, Any],
        lesson: Lesson,
        trainer: BlockTrainer,
        device: torch.device,
        captured: bool = True,
    ) -> None:
        self._captured = captured
        self.lesson, self.context, self.device = lesson, context, device
        self._engine, self._trainer = run.model.engine, trainer
        self.teacher = run.source.block(index, device)
        record = run.record(index)
        anew = lesson.compat == "rlq"
        unrounded = ActivationScheme(UNQUANTISED) if anew else None
        student = run.model.student(run.source.block(index, device), run.source, unrounded)
        ranges = run.ranges(record, device)
        self.task: BlockTask = run.model.block_task(
            index, student, run.source, ranges, context, lesson.objective, begin=False
        )
        self.task.load_learnables(_fresh(self.task) if anew else record.learned)
        if (
            anew and run.model.weight_quantizer.begins_on_weights
        ):  # with nothing smoothed inputs are those of the source
            self.task.begin_on_weights(ranges if run.model.weight_quantizer.begins_on_inputs else None)
        self.task.initial = copy.deepcopy(self.task.learnables())
        for part in self.task.transforms:
            part.lr = lesson.lr or part.lr  # type: ignore[assignment]
        for part in self.task.quantizers.values():
            if lesson.weight_lr:
                part.set_rate(lesson.weight_lr)  # type: ignore[operator]
        self._step: Step | _PlainStep | None = None

    def weights(self) -> Weights:
        """What the block computes with once it is stored as it is now."""
        weights = self.task.decode(self.task.encode())
        # what no transform touches is the student's own memory, which a captured step gives to the next block
        return {name: weight.clone() for name, weight in weights.items()}

    def targets(self, fp: Tensor, quantised: Tensor, batch: int) -> Targets:
        """What the objective asks of the teacher; `fp`, its output on the fp stream, is always there."""
        found: Targets = {"fp": run_block(self.teacher, fp, self.context, batch)}
        if "fp_on_quantised" in self.lesson.objective.targets:
            found["fp_on_quantised"] = run_block(self.teacher, quantised, self.context, batch)
        return found

    def output(self, quantised: Tensor, weights: Weights, batch: int) -> Tensor:
        """What the block makes of the quantised stream with these weights."""
        return run_block(self.task.student, quantised, self.context, batch, weights)

    def learn(self, inputs: Tensor, targets: Targets) -> None:
        """Learn on all samples for the lesson's epochs; end with the best epoch, or as it began if that was better.

        The original (`compat: rlq`) keeps what it ends with.
        """
        best, best_loss = self.task.initial, math.inf
        for _ in range(self.lesson.epochs if self.task.initial else 0):
            loss = self._epoch(inputs, targets)
            if loss < best_loss:
                best, best_loss = copy.deepcopy(self.task.learnables()), loss
        if self.lesson.compat == "rlq":
            return
        self.task.load_learnables(best)
        after = self._loss(inputs, targets)
        self.task.load_learnables(self.task.initial)
        if self._loss(inputs, targets) > after:
            self.task.load_learnables(best)

    def repeat(self, batch: dict[str, Tensor]) -> None:
        """Learn on one batch, a step an epoch."""
        for _ in range(self.lesson.epochs if self.task.initial else 0):
            self._take(batch)
        self.task.project()

    def _epoch(self, inputs: Tensor, targets: Targets) -> float:
        """Mean loss over the batches, while learning on them."""
        self.task.epoch_loss.zero_()
        count = 0
        for batch in self._batches(inputs, targets):
            self._take(batch)
            count += 1
        self.task.project()
        return self.task.epoch_loss.item() / count

    def _batches(self, inputs: Tensor, targets: Targets):
        wanted = {name: targets[name] for name in self.lesson.objective.targets}
        return batches_on(self.device, {"input": inputs, **wanted}, self.lesson.batch_size, torch.float32)

    def _take(self, batch: dict[str, Tensor]) -> None:
        step = self._step or self._begin()
        try:
            step.micro_batch(batch)
        except CaptureError as error:
            reason, self._step = str(error), None
        else:
            step.finish()
            return
        step = self._step = self._engine.failed(self.task, self._optimizer, self._trainer, reason)
        step.micro_batch(batch)
        step.finish()

    def _begin(self) -> Step | _PlainStep:
        self._optimizer = self.task.configure_optimizers()
        self.task.epoch_loss = self.task.epoch_loss.to(self.device)
        ways = self._engine.step if self._captured else self._engine.rehearsal
        step = ways(self.task, self._optimizer, self._trainer)
        self._step = step or _PlainStep(self.task, self._optimizer, self._trainer)
        return self._step

    @torch.no_grad()
    def _loss(self, inputs: Tensor, targets: Targets) -> float:
        """Mean loss of the block as it would be stored."""
        weights, losses = self.weights(), []
        for batch in self._batches(inputs, targets):
            output = call_block(self.task.student, batch["input"], self.context, weights)
            losses.append(total(all_terms(self.lesson.objective, {**batch, "output": output})))
        return torch.stack(losses).double().mean().item()


class _PlainStep:
    """A step in torch's and Lightning's own order of things."""

    def __init__(self, task: BlockTask, optimizer: torch.optim.Optimizer, trainer: BlockTrainer) -> None:
        self._task, self._optimizer, self._trainer = task, optimizer, trainer

    def micro_batch(self, batch: dict[str, Tensor]) -> None:
        with torch.enable_grad(), self._trainer.precision_plugin.forward_context():
            loss, _ = self._task.plain_loss(batch)
        loss.backward()

    def finish(self) -> None:
        self._task.on_before_optimizer_step(self._optimizer)  # without gradients if they are not finite
        self._trainer.precision_plugin.clip_gradients(
            self._optimizer,
            self._trainer.gradient_clip_val or 0,
            GradClipAlgorithmType(self._trainer.gradient_clip_algorithm or "norm"),
        )
        self._optimizer.step()
        self._optimizer.zero_grad()


def _fresh(task: BlockTask) -> dict[str, Tensor]:
    """As the original's code begins: scales 1, shifts 0; everything else as a new task has it."""
    start = {"scale": torch.ones_like, "shift": torch.zeros_like}
    fresh = {name: value.clone() for name, value in task.learnables().items()}
    for name, value in fresh.items():
        if name.startswith("transforms.") and (kind := name.rpartition(".")[2]) in start:
            fresh[name] = start[kind](value)
    return fresh

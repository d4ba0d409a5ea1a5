"""Test-time adaptation (LRQuant, ACL 2024): the last blocks learn again on the unlabelled text under test."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from ptql.callbacks.block import BlockCallback
from ptql.callbacks.tta_tasks import SEED, Mode, TasksAdapted, check_tasks
from torch import Tensor

from ptql.errors import InputError
from ptql.evaluation.adaptation import Adaptation
from ptql.evaluation.perplexity import losses_after_blocks, perplexity
from ptql.evaluation.pupil import Compat, Lesson
from ptql.evaluation.standing import Standing
from ptql.parts import check_learning_rate, settings
from ptql.parts.objectives import Objective, Reconstruction

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer
    from ptql.evaluation.recorded_run import RecordedRun
    from ptql.evaluation.tasks_under_test import TasksUnderTest
    from ptql.evaluation.text_under_test import TextUnderTest


@dataclass(frozen=True)
class Adapted:
    """A text measured while, or after, blocks learned on it.

    Args:
        losses: Of the windows that were measured, [measured], in nats.
        first: The first window that was measured.
        learned_on: Number of windows.
    """

    losses: Tensor
    first: int
    learned_on: int


class TestTimeAdaptation(BlockCallback):
    """A callback of `eval`: measures each text, and task, once more, with blocks that learn on it, without labels.

    Of a task, they learn on its documents' prompts. What calibration learned is where each text, and task, begins anew;
    the model on disk is only read. Activations stay rounded.

    Args:
        mode: `transductive`, learn on all windows, then measure all of them (the paper's); `prefix`, learn on the
            first ones and measure the others; `online`, measure each batch of windows before it is learned on. A
            document of a task is measured with the window that it begins in.
        blocks: How many of the last blocks learn.
        epochs: Passes over what is learned on; `online`, steps on each batch.
        lr: Learning rate of scales and shifts; the recipe's by default.
        weight_lr: Learning rate of what weight quantisers learn; the recipe's by default.
        prefix: Windows of the mode `prefix`.
        batch_size: Windows of a step.
        objective: Compares a block's output with that of its full-precision original; MSE + NLC on the fp stream by
            default.
        compat: `rlq` does what the original's code does instead of what its paper says: the last block begins anew,
            is adapted on the embeddings as if it were the first one, and its activations are not rounded, neither
            then nor when it is measured. Results bear the mark.
        name: In results; the mode by default, or `rlq`.

    Raises:
        InputError: A setting is out of its range, or does not go with `compat`.
    """

    __test__ = False  # its name begins as that of a class of tests

    def __init__(
        self,
        mode: Mode = "transductive",
        blocks: int = 1,
        epochs: int = 5,
        lr: float | None = None,
        weight_lr: float | None = None,
        prefix: int = 16,
        batch_size: int = 1,
        objective: Objective | None = None,
        compat: Compat = "none",
        name: str | None = None,
    ) -> None:
        for option, value, kind in (("mode", mode, Mode), ("compat", compat, Compat)):
            if value not in get_args(kind):
                raise InputError(f"tta {option}={value!r}: one of {', '.join(get_args(kind))} is needed")
        for option, number in (("blocks", blocks), ("epochs", epochs), ("prefix", prefix), ("batch_size", batch_size)):
            if not isinstance(number, int) or number < 1:
                raise InputError(f"tta {option}={number}: at least 1 is needed; leave it out for the default")
        for rate in (lr, weight_lr):
            if rate is not None:
                check_learning_rate(rate, "leave it out for the recipe's")
        if compat == "rlq" and (mode != "transductive" or blocks != 1 or objective is not None):
            raise InputError(
                f"tta compat=rlq with mode={mode}, blocks={blocks}, objective={objective}: the original adapts one "
                "block on all windows by MSE + NLC; leave these out"
            )
        if objective is not None and objective.attention is not None:
            raise InputError(
                f"tta objective={type(objective).__name__}: it looks at attention, and here outputs alone are "
                "compared; give that a weight of 0, or take another objective"
            )
        self.mode: Mode = mode
        self.blocks = blocks
        self.prefix = prefix
        self.lesson = Lesson(objective or Reconstruction(), epochs, batch_size, lr, weight_lr, compat)
        self.name = name or (compat if compat != "none" else mode)

    def settings(self) -> dict[str, Any]:
        """For results."""
        own = {"mode": self.mode, "blocks": self.blocks}
        if self.mode == "prefix":
            own["prefix"] = self.prefix
        return {**own, **vars(self.lesson), "objective": settings(self.lesson.objective)}

    # Hooks of eval

    def on_eval_start(
        self,
        trainer: BlockTrainer,
        run: RecordedRun | None,
        windows: Mapping[str, Tensor],
        tasks: TasksUnderTest | None,
    ) -> None:
        if run is None:
            raise InputError("tta: only a run has what calibration learned, and a source to learn from; give --run RUN")
        if run.model.weight_quantizer.wants_moments:
            raise InputError(
                f"tta with {type(run.model.weight_quantizer).__name__}: codes were chosen by calibration's inputs, "
                "which a block that learns again does not have; use a run with the weight quantiser Affine, or no tta"
            )
        if self.blocks > run.source.num_blocks:
            raise InputError(f"tta blocks={self.blocks}: the model has {run.source.num_blocks}; take fewer")
        for index in range(run.source.num_blocks - self.blocks, run.source.num_blocks):
            run.check_block(index)
        named = [callback for callback in trainer.callbacks if isinstance(callback, TestTimeAdaptation)]  # type: ignore[attr-defined]
        if sum(callback.name == self.name for callback in named) > 1:
            raise InputError(f"tta name={self.name!r}: two callbacks would write the same result; give each a name")
        for name, ids in windows.items():
            if self.mode == "prefix" and len(ids) <= self.prefix:
                raise InputError(
                    f"tta prefix={self.prefix}: text {name!r} has {len(ids)} windows, and none would be left to "
                    "measure; take a smaller prefix or a longer text"
                )
        if tasks is not None:
            if self.lesson.compat == "rlq":
                raise InputError(
                    f"tta compat=rlq with tasks={','.join(tasks.names)}: the original's code adapts for perplexity "
                    "only; measure tasks without it"
                )
            check_tasks(tasks, self.mode, self.prefix)

    def on_text_measured(self, trainer: BlockTrainer, text: TextUnderTest, found: dict[str, Any]) -> None:
        began = time.monotonic()
        standing = text.before_last(self.blocks)
        walked = time.monotonic()
        adaptation = Adaptation(text.run, self.lesson, trainer, text.device, text.batch_size)
        with isolate_rng():  # parts may draw random numbers while they learn: the same, whatever came before
            torch.manual_seed(SEED)
            adapted = (self._online if self.mode == "online" else self._ahead)(adaptation, text, standing)
        if text.device.type == "cuda":
            torch.cuda.synchronize(text.device)
        passes = 0.0 if self.lesson.compat == "rlq" else standing.seconds  # which learns on embeddings
        seconds = time.monotonic() - walked + passes
        length = text.windows.shape[1]
        result = self._result(found)
        same = text.losses[adapted.first :]
        for part, losses in (("ppl", adapted.losses), ("without", same)):
            result.setdefault(part, {})[text.name] = perplexity(losses, length)
        result.setdefault("details", {})[text.name] = {
            "windows": len(adapted.losses),
            "adapted_on": adapted.learned_on,
            "seconds": round(seconds, 2),
        }
        print(
            f"{text.name}: {self.name}, {result['without'][text.name]:.2f} -> {result['ppl'][text.name]:.2f}, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )

    def on_tasks_measured(self, trainer: BlockTrainer, tasks: TasksUnderTest, found: dict[str, Any]) -> None:
        began = time.monotonic()
        adapted = TasksAdapted(tasks, self.mode, self.blocks, self.prefix, self.lesson, trainer)
        result = self._result(found)
        result["tasks"] = adapted.scores()
        result["tasks_without"] = adapted.scores_without(found["tasks"]["results"])
        result["task_details"] = adapted.details
        print(f"tasks: {self.name}, {time.monotonic() - began:.0f} s", flush=True)

    def _result(self, found: dict[str, Any]) -> dict[str, Any]:
        """Where the results of this callback go."""
        result = found.setdefault("tta", {}).setdefault(self.name, {"settings": self.settings()})
        if self.lesson.compat != "none":
            result["compat"] = self.lesson.compat
        return result

    # Texts

    def _ahead(self, adaptation: Adaptation, text: TextUnderTest, standing: Standing) -> Adapted:
        """Learn block by block, then measure."""
        prefix = self.mode == "prefix"
        count, first = (self.prefix, self.prefix) if prefix else (len(text.windows), 0)
        embeddings = text.start().fp if self.lesson.compat == "rlq" else None
        after = adaptation.ahead(standing, count, embeddings).quantised
        return Adapted(losses_after_blocks(text.shell, after[first:], text.windows[first:], text.device), first, count)

    def _online(self, adaptation: Adaptation, text: TextUnderTest, standing: Standing) -> Adapted:
        """Measure a batch of windows, then learn on it."""
        blocks, losses, size = adaptation.online(standing), [], self.lesson.batch_size
        for start in range(0, len(text.windows), size):
            part = slice(start, start + size)
            losses.append(losses_after_blocks(text.shell, blocks.see(part), text.windows[part], text.device))
            blocks.learn()
        return Adapted(torch.cat(losses), 0, len(text.windows))

"""Test-time adaptation to tasks of lm-eval: the last blocks learn on prompts, the whole model gets their weights."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from ptql.errors import InputError
from ptql.evaluation.adaptation import Adaptation
from ptql.evaluation.pupil import Lesson
from ptql.parts.transforms import Weights

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from ptql.calibration.trainer import BlockTrainer
    from ptql.evaluation.prompt_text import PromptText
    from ptql.evaluation.standing import Standing
    from ptql.evaluation.tasks_under_test import TasksUnderTest

Mode = Literal["transductive", "prefix", "online"]
SEED = 0  # of parts that draw random numbers while they learn: the same for each task, whichever came before


def check_tasks(tasks: TasksUnderTest, mode: Mode, prefix: int) -> None:
    """Read the tasks' prompts; `InputError` where they can't be adapted to."""
    if not tasks.on_one_device:
        raise InputError(
            f"tta tasks={','.join(tasks.names)}: adapted blocks are put into the whole model, which does not fit on "
            f"{tasks.device}; take a larger device, or measure texts only"
        )
    for name, text in tasks.texts.items():
        if mode == "prefix" and not text.after(prefix):
            raise InputError(
                f"tta prefix={prefix}: task {name!r} has {len(text.windows)} windows of {text.windows.shape[1]} tokens "
                "and no document would be left to measure; take a smaller prefix or more documents"
            )


class TasksAdapted:
    """Tasks that are run again, each with blocks that begin as calibration left them and learn on its prompts.

    Args:
        tasks: What was run as usual; its model is as it was afterwards.
        mode: As in `TestTimeAdaptation`.
        blocks: How many of the last blocks learn.
        prefix: Windows of the mode `prefix`.
        lesson: How they learn.
        trainer: Says how steps are computed.
    """

    def __init__(
        self, tasks: TasksUnderTest, mode: Mode, blocks: int, prefix: int, lesson: Lesson, trainer: BlockTrainer
    ) -> None:
        assert tasks.run is not None
        self._tasks, self._run, self._blocks, self._lesson = tasks, tasks.run, blocks, lesson
        self._mode: Mode = mode
        self._batch = lesson.batch_size if mode == "online" else tasks.batch_size
        self._adaptation = Adaptation(tasks.run, lesson, trainer, tasks.device, self._batch)
        self._learned_on = {name: self._count(text, prefix) for name, text in tasks.texts.items()}
        self._samples = {name: text.after(prefix) for name, text in tasks.texts.items()} if mode == "prefix" else None
        self.details: dict[str, dict[str, float]] = {}
        """Of each task, once it was run: documents that were scored, windows that were learned on, seconds of that."""

    def _count(self, text: PromptText, prefix: int) -> int:
        """How many windows are learned on."""
        if self._mode == "online":
            # Whole batches, and only those after which a document is left: what is answered never depends on later
            # documents, not even on whether there are some.
            return text.starts[-1] // text.stride // self._batch * self._batch
        return prefix if self._mode == "prefix" else len(text.windows)

    def scores(self) -> dict[str, Any]:
        """Scores by task, with blocks that learn."""
        return self._tasks.scores(self._samples, self._parts)["results"]

    def scores_without(self, usual: Mapping[str, Any]) -> dict[str, Any]:
        """Scores of the same documents, with blocks that don't; `usual` are those of all documents."""
        return dict(usual) if self._samples is None else self._tasks.scores(self._samples)["results"]

    def _parts(self, task: str, requests: list[Instance]) -> Generator[list[Instance], None, None]:
        """A task's requests, in the parts in which they are answered; blocks learn before or between."""
        text = self._tasks.texts[task]
        documents = len({instance.doc_id for instance in requests})
        self.details[task] = {"documents": documents, "adapted_on": self._learned_on[task], "seconds": 0.0}
        former: dict[int, Weights] = {}
        try:
            if not self._learned_on[task]:
                yield requests
            elif self._mode == "online":
                yield from self._online(task, text, requests, former)
            else:
                with self._learning(task):
                    learned = self._adaptation.ahead(self._standing(task, text), self._learned_on[task])
                    former |= self._tasks.swap(learned.weights)
                del learned  # hidden states take room
                yield requests
        finally:
            self._tasks.swap(former)

    def _online(
        self, task: str, text: PromptText, requests: list[Instance], former: dict[int, Weights]
    ) -> Generator[list[Instance], None, None]:
        """A document is answered once all batches of windows before it are learned on, and none that it is in."""
        with self._learning(task):
            blocks = self._adaptation.online(self._standing(task, text))
        ends = range(self._batch, self._learned_on[task] + 1, self._batch)
        by_step = groupby(
            requests, lambda instance: bisect_right(ends, text.starts[instance.doc_id or 0] // text.stride)
        )
        done = 0
        for step, part in by_step:
            with self._learning(task):
                for k in range(done, step):
                    blocks.see(slice(k * self._batch, (k + 1) * self._batch))
                    blocks.learn()
                if step > done:
                    before = self._tasks.swap(blocks.weights())
                    former.update(former or before)
            done = step
            yield list(part)

    def _standing(self, task: str, text: PromptText) -> Standing:
        """Hidden states of the windows that are learned on, before the first block that learns."""
        windows = text.windows[: self._learned_on[task]]
        target = self._run.source.num_blocks - self._blocks
        start = self._tasks.start(windows, self._batch)
        return start.moved_to(target, self._run, self._tasks.device, self._batch)

    @contextmanager
    def _learning(self, task: str) -> Iterator[None]:
        """Count the seconds, and leave random numbers as they were."""
        began = time.monotonic()
        with isolate_rng():
            torch.manual_seed(SEED)
            yield
        if self._tasks.device.type == "cuda":
            torch.cuda.synchronize(self._tasks.device)
        seconds = self.details[task]["seconds"] + time.monotonic() - began
        self.details[task]["seconds"] = round(seconds, 2)

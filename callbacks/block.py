"""Callbacks that see the loop over blocks, not only the fit of one block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from torch import Tensor

if TYPE_CHECKING:
    from ptql.calibration.block_task import BlockTask
    from ptql.calibration.ledger import BlockRecord
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer
    from ptql.evaluation.recorded_run import RecordedRun
    from ptql.evaluation.tasks_under_test import TasksUnderTest
    from ptql.evaluation.text_under_test import TextUnderTest


class BlockCallback(Callback):
    """A callback with hooks around the loop over blocks, and of eval; those that are not overridden do nothing.

    With several processes each of them calls the hooks; `trainer.is_global_zero` tells the first one.
    """

    def on_model_start(self, trainer: BlockTrainer, model: QuantLM) -> None:
        """Before the first block; the run's directory belongs to this run."""

    def on_block_start(self, trainer: BlockTrainer, task: BlockTask) -> None:
        """The task of block `trainer.block` is ready; nothing is learned yet."""

    def on_block_end(self, trainer: BlockTrainer, record: BlockRecord) -> None:
        """Block `trainer.block` is in the ledger, by this process or an earlier one."""

    def on_model_end(self, trainer: BlockTrainer, model: QuantLM) -> None:
        """After the last block; the packed model is written."""

    def on_eval_start(
        self,
        trainer: BlockTrainer,
        run: RecordedRun | None,
        windows: Mapping[str, Tensor],
        tasks: TasksUnderTest | None,
    ) -> None:
        """Before anything is measured; `windows` [samples, tokens] of each text. `run` is None for other models.

        What goes on in `eval` is refused here if it can't be done.
        """

    def on_text_measured(self, trainer: BlockTrainer, text: TextUnderTest, found: dict[str, Any]) -> None:
        """The perplexity of a text is known, for a run's model; `found` goes to metrics.json, and may be added to."""

    def on_tasks_measured(self, trainer: BlockTrainer, tasks: TasksUnderTest, found: dict[str, Any]) -> None:
        """The scores of the tasks are known, for a run's model; `found` goes to metrics.json, and may be added to."""

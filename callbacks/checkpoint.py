"""Saves the block in hand now and then, and when a signal came: a stopped run goes on inside a block."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Checkpoint
from ptql.callbacks.block import BlockCallback

from ptql.calibration.run_logger import RunLogger
from ptql.errors import InputError

if TYPE_CHECKING:
    from ptql.calibration.block_task import BlockTask
    from ptql.calibration.ledger import BlockRecord
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer


class BlockCheckpoint(Checkpoint, BlockCallback):
    """Lightning checkpoints of the block in hand: its learnables, the optimiser, where the loops stand.

    A `Checkpoint`, so Lightning calls it after the task itself, which has noted the epoch by then.

    Args:
        every_seconds: Save at the end of an epoch if the last save, or the block's start, is at least so long ago.
    """

    def __init__(self, every_seconds: float = 60.0) -> None:
        if every_seconds < 0:
            raise InputError(f"every_seconds={every_seconds}: a time is 0 or more; 60 is usual")
        self.every_seconds = every_seconds
        self.seconds = 0.0  # spent on saving, of this process
        self._saved = 0.0
        self._log_is_clear = False  # of steps that an earlier process logged and did not save

    def on_model_start(self, trainer: BlockTrainer, model: QuantLM) -> None:
        self.seconds = 0.0

    def on_train_start(self, trainer: BlockTrainer, pl_module: BlockTask) -> None:  # type: ignore[override]
        trainer.signals.take_over()  # from Lightning, which has just put its own handler in place
        self._clear_log(trainer)
        self._saved = time.monotonic()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: BlockTrainer, pl_module: BlockTask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the epoch's end comes next; Lightning would leave it out of a run that goes on from here
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients of part of a step are not in a checkpoint
        if trainer.ranks.any(trainer.signals.received is not None):
            self._save(trainer)
            trainer._logger_connector.update_train_step_metrics()  # Lightning logs the step after this hook
            trainer.stop()

    def on_train_epoch_end(self, trainer: BlockTrainer, pl_module: BlockTask) -> None:  # type: ignore[override]
        due = trainer.is_global_zero and time.monotonic() - self._saved >= self.every_seconds
        stop = trainer.ranks.any(trainer.signals.received is not None)
        if trainer.ranks.any(due) or stop:
            self._save(trainer)
        if stop:
            trainer.stop()

    def on_block_end(self, trainer: BlockTrainer, record: BlockRecord) -> None:
        if trainer.is_global_zero and not record.resumed:
            trainer.partial.clear()

    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: BlockTrainer, pl_module: BlockTask, checkpoint: dict[str, Any]
    ) -> None:
        device = trainer.strategy.root_device
        checkpoint["first_step"] = trainer.first_step
        checkpoint["random"] = torch.get_rng_state()
        checkpoint["random_gpu"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def on_load_checkpoint(  # type: ignore[override]
        self, trainer: BlockTrainer, pl_module: BlockTask, checkpoint: dict[str, Any]
    ) -> None:
        trainer.first_step = checkpoint["first_step"]
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.forget_after(trainer.first_step + checkpoint["global_step"])
        self._log_is_clear = True
        torch.set_rng_state(checkpoint["random"])
        if checkpoint["random_gpu"] is not None:
            torch.cuda.set_rng_state(checkpoint["random_gpu"], trainer.strategy.root_device)

    def _clear_log(self, trainer: BlockTrainer) -> None:
        """A block that begins anew was perhaps begun before: what was logged of it then is shown no more.

        Where later blocks are finished (this one's file was damaged) their curves would go, too: it is shown twice.
        """
        later = any(int(index) > trainer.block for index in trainer.ledger.manifest["blocks"])
        for logger in trainer.loggers:
            if not self._log_is_clear and not later and isinstance(logger, RunLogger):
                logger.forget_after(trainer.steps)
        self._log_is_clear = True

    def _save(self, trainer: BlockTrainer) -> None:
        began = time.monotonic()
        trainer.save_checkpoint(trainer.partial.scratch, weights_only=False)  # all of it
        if trainer.is_global_zero:
            trainer.partial.keep(trainer.block)
        trainer.strategy.barrier("partial")
        self._saved = time.monotonic()
        self.seconds += self._saved - began

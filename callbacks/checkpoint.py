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

    def on_train_start(self, trainer: BlockTrainer, pl_module: BlockTask) -> None:  # type: ignore[override]
        trainer.signals.take_over()  # from Lightning, which has just put its own handler in place
        self._saved = time.monotonic()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: BlockTrainer, pl_module: BlockTask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = batch_idx + 1 == trainer.num_training_batches
        if not last and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients of part of a step are not in a checkpoint
        if trainer.ranks.any(trainer.signals.received is not None):
            self._save(trainer)
            trainer.stop()

    def on_train_epoch_end(self, trainer: BlockTrainer, pl_module: BlockTask) -> None:  # type: ignore[override]
        due = trainer.is_global_zero and time.monotonic() - self._saved >= self.every_seconds
        if trainer.ranks.any(due):
            self._save(trainer)

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
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.forget_after(trainer.first_step + checkpoint["global_step"])
        torch.set_rng_state(checkpoint["random"])
        if checkpoint["random_gpu"] is not None:
            torch.cuda.set_rng_state(checkpoint["random_gpu"], trainer.strategy.root_device)

    def _save(self, trainer: BlockTrainer) -> None:
        began = time.monotonic()
        trainer.save_checkpoint(trainer.partial.scratch, weights_only=False)  # all of it
        if trainer.is_global_zero:
            trainer.partial.keep(trainer.block)
        trainer.strategy.barrier("partial")
        self._saved = time.monotonic()
        self.seconds += self._saved - began

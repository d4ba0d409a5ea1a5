"""Callbacks that see the loop over blocks, not only the fit of one block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Callback

if TYPE_CHECKING:
    from ptql.calibration.block_task import BlockTask
    from ptql.calibration.ledger import BlockRecord
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer


class BlockCallback(Callback):
    """A callback with hooks around the loop over blocks; those that are not overridden do nothing.

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

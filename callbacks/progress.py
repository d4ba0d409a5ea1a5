"""Progress of a run: two bars and a line a block on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ProgressBar
from ptql.callbacks.bars import Bars, on_terminal
from ptql.callbacks.block import BlockCallback
from ptql.callbacks.pace import Pace

from ptql.report.numbers import duration, figure

if TYPE_CHECKING:
    from ptql.calibration.block_task import BlockTask
    from ptql.calibration.ledger import BlockRecord
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer


class BlockProgress(ProgressBar, BlockCallback):
    """Blocks of the model and steps of the block in hand, with loss and time left.

    Args:
        refresh_per_second: How often the bars are drawn.
        line_every_seconds: Without a terminal, how long a block may take without a line.
    """

    def __init__(self, refresh_per_second: float = 4.0, line_every_seconds: float = 60.0) -> None:
        super().__init__()
        self._rate, self._patience = refresh_per_second, line_every_seconds
        self._shown = False
        self._bars: Bars | None = None
        self._pace = Pace(time.monotonic)
        self._passed: list[int] = []  # blocks that were finished earlier and are not said yet
        self._said = self._looked = 0.0

    # Lightning switches bars off and on by rank; this one is drawn by the first rank alone.
    def disable(self) -> None:
        return None

    def enable(self) -> None:
        return None

    def on_model_start(self, trainer: BlockTrainer, model: QuantLM) -> None:
        self._shown = trainer.is_global_zero
        self._pace, self._passed, self._said = Pace(time.monotonic), [], time.monotonic()
        if self._shown and on_terminal():
            self._bars = Bars(trainer.num_blocks, self._rate)

    def on_block_start(self, trainer: BlockTrainer, task: BlockTask) -> None:
        self._say_passed(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.num_training_batches * trainer.max_epochs
        done = trainer.current_epoch * trainer.num_training_batches  # not zero where a block goes on
        self._pace.block_begins_at(done / max(total, 1))
        self._looked = 0.0
        if self._bars is not None:
            self._bars.steps(done, total)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._shown:
            return
        total = trainer.num_training_batches * trainer.max_epochs
        done = trainer.current_epoch * trainer.num_training_batches + batch_idx + 1
        if self._bars is not None:
            self._bars.steps(done, total)
        now = time.monotonic()
        if now - (self._looked if self._bars is not None else self._said) < (1 if self._bars else self._patience):
            return  # reading the loss waits for the GPU: now and then only
        self._looked = now
        left = self._left(trainer, trainer.block, done / total)
        state = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}{_loss(trainer)}"
        if skipped := int(pl_module.skipped_steps):
            state += f"  {skipped} skipped"
        if self._bars is not None:
            self._bars.notes(left, state)
        else:
            self._say(f"{_name(trainer)}  {state}" + (f"  {left}" if left else ""))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._bars is not None:
            self._bars.notes(steps="encoding")

    def on_block_end(self, trainer: BlockTrainer, record: BlockRecord) -> None:
        if not self._shown:
            return
        took, done = self._pace.block_ends(counts=not record.resumed), trainer.block + 1
        left = self._left(trainer, done)
        if self._bars is not None:
            self._bars.blocks(done)
            self._bars.notes(left, "finished earlier" if record.resumed else "")
        if record.resumed:
            self._passed.append(done)
            if done == trainer.num_blocks or time.monotonic() - self._said >= self._patience:
                self._say_passed(trainer)
        else:
            self._say_passed(trainer)
            line = f"{_name(trainer)}  {_outcome(record.summary, took)}"
            self._say(line + (f"  {left}" if left and self._bars is None else ""))
        if done == trainer.num_blocks:
            self._close()

    def on_model_end(self, trainer: BlockTrainer, model: QuantLM) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        self._say(" ".join(map(str, args)))

    def _left(self, trainer: BlockTrainer, done: int, share: float = 0.0) -> str:
        seconds = self._pace.left(trainer.num_blocks - done, share) if done < trainer.num_blocks else None
        return "" if seconds is None else f"{duration(seconds)} left"

    def _say_passed(self, trainer: BlockTrainer) -> None:
        """One line for all the blocks that were finished earlier and follow one another."""
        if self._passed:
            first, last = self._passed[0], self._passed[-1]
            which = f"block {first}" if first == last else f"blocks {first}-{last}"
            self._passed = []
            self._say(f"{which} of {trainer.num_blocks}: finished earlier")

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        if self._bars is not None:
            self._bars.say(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bars is not None:
            self._bars.close()
            self._bars = None


def _name(trainer: Any) -> str:
    return f"block {trainer.block + 1}/{trainer.num_blocks}"


def _loss(trainer: Any) -> str:
    loss = trainer.callback_metrics.get("loss/total")
    return "" if loss is None else f"  loss {figure(loss.item(), 3)}"


def _outcome(summary: dict[str, Any], seconds: float) -> str:
    """What came of a block; with everything that can be in it, a line of 80 characters holds it."""
    start, end = figure(summary.get("loss_start")), figure(summary.get("loss"))
    parts = [f"loss {start} -> {end}" if start != end else f"loss {end}", duration(seconds)]
    if summary.get("fell_back"):
        parts.append("start kept")
    if skipped := summary.get("skipped_steps"):
        parts.append(f"{skipped} skipped")
    return "  ".join(parts)

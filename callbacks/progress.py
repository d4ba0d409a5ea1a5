"""Progress of a run: two bars on a terminal, one line a block elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ProgressBar
from ptql.callbacks.block import BlockCallback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from ptql.calibration.block_task import BlockTask
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer


class BlockProgress(ProgressBar, BlockCallback):
    """Blocks of the model and steps of the block in hand, with the time left.

    Args:
        refresh_per_second: How often the bars are drawn.
    """

    def __init__(self, refresh_per_second: float = 4.0) -> None:
        super().__init__()
        self._rate = refresh_per_second
        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._began = self._first = 0.0
        self._resumed = 0

    # Lightning switches bars off and on by rank; this one is drawn by the first rank alone.
    def disable(self) -> None:
        return None

    def enable(self) -> None:
        return None

    def on_model_start(self, trainer: BlockTrainer, model: QuantLM) -> None:
        self._began = time.monotonic()
        if trainer.is_global_zero and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
            clock = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._bars = Progress(*columns, *clock, refresh_per_second=self._rate, console=self._console)
            self._blocks = self._bars.add_task("blocks", total=trainer.num_blocks, note="")
            self._steps = self._bars.add_task("steps ", total=None, note="")
            self._bars.start()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._bars is not None:
            self._bars.reset(self._steps, total=trainer.num_training_batches * trainer.max_epochs)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bars is not None:
            self._bars.update(self._steps, advance=1, note="")

    def on_train_epoch_end(self, trainer: Any, pl_module: BlockTask) -> None:
        if self._bars is not None:
            loss = trainer.callback_metrics.get("loss/total")
            self._bars.update(self._steps, note="" if loss is None else f"loss {loss.item():.4g}")

    def on_block_end(self, trainer: BlockTrainer, summary: dict[str, Any]) -> None:
        done = trainer.block + 1
        if not trainer.is_global_zero:
            return
        if summary.get("resumed"):
            self._resumed += 1
        note = f"loss {summary['loss_start']:.4g} -> {summary['loss']:.4g}"
        if self._bars is not None:
            self._bars.update(self._blocks, completed=done, note=note)
            return
        elapsed = time.monotonic() - self._began
        learned = done - self._resumed
        left = elapsed / max(learned, 1) * (trainer.num_blocks - done)
        extra = "  finished earlier" if summary.get("resumed") else "  kept its start" if summary["fell_back"] else ""
        self._console.print(
            f"block {done}/{trainer.num_blocks}  {note}  {elapsed:.0f} s, {left:.0f} s left{extra}",
            soft_wrap=True,
        )

    def on_model_end(self, trainer: BlockTrainer, model: QuantLM) -> None:
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        self._console.print(*args, **kwargs)

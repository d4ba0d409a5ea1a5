"""Progress of the restoring stage: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from ptql.callbacks.bars import Bars, on_terminal

from ptql.report.numbers import duration, figure

if TYPE_CHECKING:
    from ptql.restoration.lora_task import LoRATask


class RestorationProgress(Callback):
    """Steps, loss and time left.

    Args:
        steps: Of the stage.
        done: By earlier processes.
        line_every_seconds: Without a terminal, how long it may take without a line.
    """

    def __init__(self, steps: int, done: int, line_every_seconds: float = 60.0) -> None:
        self._steps, self._done, self._patience = steps, done, line_every_seconds
        self._bars: Bars | None = None
        self._began = self._said = 0.0

    def on_train_start(self, trainer: Any, pl_module: LoRATask) -> None:  # type: ignore[override]
        self._began = self._said = time.monotonic()
        if on_terminal():
            self._bars = Bars(None, 4.0)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Any, pl_module: LoRATask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        done = self._done + trainer.global_step
        if self._bars is not None:
            self._bars.steps(done, self._steps)
        now = time.monotonic()
        if done < self._steps and now - self._said < (1 if self._bars else self._patience):
            return
        self._said = now
        loss = f"loss {figure(pl_module.losses[-1][1], 4)}" if pl_module.losses else ""
        left = duration((now - self._began) / max(trainer.global_step, 1) * (self._steps - done))
        state = f"{loss}  {left} left" if done < self._steps else loss
        if self._bars is not None:
            self._bars.notes(steps=state)
        else:
            print(f"restoration: step {done}/{self._steps}  {state}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Any, pl_module: LoRATask) -> None:  # type: ignore[override]
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bars is not None:
            self._bars.close()
            self._bars = None

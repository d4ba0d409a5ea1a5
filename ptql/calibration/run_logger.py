"""TensorBoard for a run that may be stopped and go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter


class RunLogger(TensorBoardLogger):
    """TensorBoard on one step axis, also where a run goes on: the steps of earlier processes count."""

    first_step = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.goes_on = any(Path(self.log_dir).glob("events.out.tfevents.*"))
        """Whether an earlier process has logged here."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else self.first_step + step)

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """What an earlier process logged at `step` or later, after its last save, is shown no more."""
        if not self.goes_on:
            return
        self.experiment.close()
        self._experiment = SummaryWriter(self.log_dir, purge_step=step)  # a newer file: they are read by age

"""TensorBoard for a run that may be stopped and go on."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.tensorboard import SummaryWriter


class RunLogger(TensorBoardLogger):
    """TensorBoard on one step axis, also where a run goes on: the steps of earlier processes count."""

    first_step = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else self.first_step + step)

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """What an earlier process logged at `step` or later, after its last save, is shown no more."""
        self.experiment.close()  # what comes after goes to a newer file: TensorBoard reads them by age
        SummaryWriter(self.log_dir, purge_step=step).close()

"""TensorBoard for a run that may be stopped and go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]


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
        if self.goes_on:
            writer = self.experiment._get_file_writer()
            writer.add_event(Event(step=step, file_version="brain.Event:2"))
            writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """A block's fit has ended; the run writes on into the same file.

        TensorBoard reads files by name, which tells the second and then a count that is not padded: of several files
        of one second, the tenth would be read before the ninth.
        """
        if self._experiment is not None:
            self._experiment.flush()

    @rank_zero_only
    def close(self) -> None:
        """The run has ended."""
        if self._experiment is not None:
            self._experiment.close()

"""What breaks around a run, in one line that says how to go on: the disk, the device's memory, another process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ptql.calibration.data import CalibrationData
from ptql.disk import told_if_full
from ptql.errors import InputError, RunError

if TYPE_CHECKING:
    from ptql.calibration.run_trainer import RunTrainer

PATIENCE_SECONDS = 3.0


@contextmanager
def told_in_one_line(trainer: RunTrainer, data: CalibrationData) -> Iterator[None]:
    """Around a whole `fit`; a bug of ours still shows its traceback.

    Raises:
        InputError: No room on the disk, or in the device's memory.
        RunError: Another process of the run has ended.
    """
    try:
        with told_if_full(trainer.run_dir):
            yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory on {trainer.strategy.root_device} with batches of {data.batch_size} x {data.length} tokens "
            f"({str(error).partition('. ')[0]}); use a smaller --data.batch_size or --data.length, or "
            "--trainer.precision bf16-mixed"
        ) from error
    except RunError:
        raise
    except RuntimeError as error:
        if (ended := process_that_ended(trainer)) is None:
            raise
        raise RunError(
            f"{ended}, so all of them end; what it said stands above, and the same command goes on from what was saved"
        ) from error


def process_that_ended(trainer: RunTrainer) -> str | None:
    """Of the processes that this one started, one that failed: why messages between them fail."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return None
    until = time.monotonic() + PATIENCE_SECONDS
    while launcher.procs and time.monotonic() < until:
        for rank, process in enumerate(launcher.procs, start=1):
            if code := process.poll():
                end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return f"process {rank} of {trainer.world_size} ended with {end}"
        time.sleep(0.1)
    return None

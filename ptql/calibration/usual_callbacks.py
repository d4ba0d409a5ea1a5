"""The callbacks that belong to every run."""

from __future__ import annotations

import math

from lightning.pytorch import Callback

from ptql.callbacks import BlockCheckpoint, BlockPlots, BlockProgress


def with_usual_callbacks(given: Callback | list[Callback] | None, progress: bool, checkpoints: bool) -> list[Callback]:
    """The given callbacks and, of those that belong to every run, the ones that are not among them.

    Without `checkpoints` a block is saved only when a signal ends the run in its middle.
    """
    callbacks = [given] if isinstance(given, Callback) else list(given or [])
    usual = [BlockCheckpoint() if checkpoints else BlockCheckpoint(every_seconds=math.inf), BlockPlots()]
    if progress:
        usual.insert(0, BlockProgress())
    return callbacks + [own for own in usual if not any(isinstance(callback, type(own)) for callback in callbacks)]

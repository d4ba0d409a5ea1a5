"""Which of Lightning's Trainer options a run of blocks can use; the others are refused by name."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from ptql.callbacks import BlockCheckpoint
from ptql.errors import InputError

MAX_EPOCHS = 10_000
MAX_DEVICES = 1024
NAME_BYTES = 255
PATH_CHARACTERS = 1000  # systems take some 4,000 bytes; what a run puts below must fit, too
SAME_EPOCHS = "every block learns for the same number of epochs; use --trainer.max_epochs N"
NO_VALIDATION = "a block has no validation, so it would do nothing; leave it out"
UNUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_steps": ((-1,), SAME_EPOCHS),
    "min_steps": ((None,), SAME_EPOCHS),
    "min_epochs": ((None,), SAME_EPOCHS),
    "max_time": ((None,), SAME_EPOCHS),
    "limit_train_batches": ((None, 1.0), "every epoch sees all windows; use --data.samples N for fewer"),
    "overfit_batches": ((0,), "every epoch sees all windows; use --data.samples N for fewer"),
    "limit_val_batches": ((None,), NO_VALIDATION),
    "limit_test_batches": ((None,), NO_VALIDATION),
    "limit_predict_batches": ((None,), NO_VALIDATION),
    "val_check_interval": ((None,), NO_VALIDATION),
    "check_val_every_n_epoch": ((1, None), NO_VALIDATION),
    "num_sanity_val_steps": ((None, 0), NO_VALIDATION),
    "barebones": ((False,), "it takes away what a run is kept by; leave it out, or use --trainer.logger false"),
    "plugins": ((None, []), "precision and processes have options of their own; leave it out"),
    "sync_batchnorm": ((False,), "blocks have no batch norms; leave it out"),
    "reload_dataloaders_every_n_epochs": ((0,), "a block's data stay the same; leave it out"),
    "use_distributed_sampler": ((False,), "windows are spread over processes already; leave it out"),
    "model_registry": ((None,), "a result is not uploaded; leave it out"),
}
"""Option: the values that change nothing, and why others are refused."""
PRECISIONS = (None, 16, 32, "16", "32", "bf16", "32-true", "16-mixed", "bf16-mixed")
STOPPERS = (
    *(BaseFinetuning, BasePredictionWriter, BatchSizeFinder, Checkpoint, EarlyStopping, GradientAccumulationScheduler),
    *(LearningRateFinder, ModelPruning, StochasticWeightAveraging, Timer, WeightAveraging),
)
"""Callbacks that change what, or for how long, a block learns, and were made for one fit, not for one a block."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `InputError` for an option that a run can't use, or a value that no run can have."""
    for name, (usual, reason) in UNUSED.items():
        if name in options and not _is_one_of(options[name], usual):
            raise InputError(f"{name}={options[name]}: {reason}")
    _check_number(options, "max_epochs", 0, MAX_EPOCHS, f"{SAME_EPOCHS}, a whole number from 0 to {MAX_EPOCHS:,}")
    _check_number(options, "accumulate_grad_batches", 1, math.inf, "a step takes 1 batch or more; leave it out for 1")
    _check_number(options, "log_every_n_steps", 0, math.inf, "a number of steps is 0 or more; 10 is usual")
    _check_number(options, "num_nodes", 1, math.inf, "a run has 1 node or more; leave it out for 1")
    _check_number(options, "fast_dev_run", 0, math.inf, "true tries one batch of one block; leave it out for a run")
    clip = options.get("gradient_clip_val")
    if isinstance(clip, (int, float)) and not 0 <= clip < math.inf:
        raise InputError(f"gradient_clip_val={clip}: a largest norm is a number, 0 or more; leave it out for none")
    if not _is_one_of(options.get("precision"), PRECISIONS):
        raise InputError(
            f"precision={options['precision']}: learnables and rounding are float32; use --trainer.precision "
            "bf16-mixed or 16-mixed for faster products, or leave it out"
        )
    _check_devices(options.get("devices"))
    _check_directory(options.get("default_root_dir"))
    _check_callbacks(options.get("callbacks"))


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    return any(value == usual and isinstance(value, bool) == isinstance(usual, bool) for usual in values)


def _check_number(options: Mapping[str, Any], name: str, low: int, high: int | float, rule: str) -> None:
    value = options.get(name, low)
    if not isinstance(value, int) or not low <= value <= high:
        if value is None and name == "log_every_n_steps":
            return  # Lightning's own default
        raise InputError(f"{name}={value}: {rule}")


def _check_devices(devices: Any) -> None:
    count = int(devices) if isinstance(devices, str) and devices.strip().isdecimal() else devices
    if isinstance(count, int) and count > MAX_DEVICES:
        raise InputError(f"devices={devices}: a run has at most {MAX_DEVICES:,} processes; give as many as there are")


def _check_directory(directory: Any) -> None:
    if directory is None:
        return
    path = os.fspath(directory)
    remedy = "give another --trainer.default_root_dir"
    if not path.strip() or "\0" in path:
        raise InputError(f"default_root_dir={path!r}: a run needs a directory; {remedy}")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"default_root_dir={path!r}: safetensors files need paths in UTF-8; {remedy}") from None
    if "://" in path:
        raise InputError(f"default_root_dir={path}: a run is a local directory; {remedy}")
    if len(path) > PATH_CHARACTERS or any(len(os.fsencode(name)) > NAME_BYTES for name in path.split(os.sep)):
        rule = f"a path has at most {PATH_CHARACTERS} characters, and a name in it {NAME_BYTES} bytes"
        raise InputError(f"default_root_dir={path}: {rule}; {remedy}")


def _check_callbacks(given: Callback | Iterable[Callback] | None) -> None:
    for callback in [given] if isinstance(given, Callback) else given or []:
        if isinstance(callback, STOPPERS) and not isinstance(callback, BlockCheckpoint):
            raise InputError(
                f"callbacks: {type(callback).__name__} is made for one fit, and here each block has its own; leave it "
                "out (blocks are saved by themselves, and keep their best epoch)"
            )

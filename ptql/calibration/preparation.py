"""Everything that is checked before a run begins: what fails here fails in seconds, and leaves nothing behind."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from ptql.calibration.data import CalibrationData
from ptql.calibration.dry_run import DryRun
from ptql.calibration.ledger import Ledger
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.formats.ptql import PackedFormat

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer


@dataclass(frozen=True)
class Plan:
    """A run that may begin.

    Args:
        source: The model.
        stored_as: How the result is described in its config.json.
        windows: Token ids [samples, length] of all processes.
        batch_size: Windows in a batch of one process.
        identity: What decides the result; a ledger of another identity is refused.
        seed: Random numbers of block i are seeded with this + i.
        dropped: A line about samples that do not divide evenly, or None.
    """

    source: Checkpoint
    stored_as: PackedFormat
    windows: Tensor
    batch_size: int
    identity: dict[str, Any]
    seed: int
    dropped: str | None

    def ledger(self, run: Path) -> Ledger:
        return Ledger(run, self.identity)


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that can't calibrate: a block fits on one device, so only samples are spread."""
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy):
        raise InputError(
            f"strategy={type(strategy).__name__}: a block is learned whole on each device, and the samples are "
            "spread; use --trainer.strategy=ddp"
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "strategy=ddp_spawn (or ddp_fork, ddp_notebook): these start their processes anew for every block; use "
            "--trainer.strategy=ddp, or torchrun"
        )


def prepare(trainer: BlockTrainer, model: QuantLM, data: CalibrationData) -> Plan:
    """Check all that was given, and try one block; the first process does what is needed once."""
    source = model.open()
    stored_as = model.packed_format(source, model.added_biases(source.block(0), source))
    windows = data.windows(source.directory, source.context, source.family.bos)
    processes = trainer.world_size
    if len(windows) < processes:
        raise InputError(
            f"samples={len(windows)}: each of the {processes} processes needs one; use --data.samples {processes}"
        )
    used = len(windows) // processes * processes
    dropped = None
    if used < len(windows):
        dropped = f"{len(windows)} samples do not divide by {processes} processes: the last {len(windows) - used} are left out"
    identity = _identity(trainer, model, data, source, windows)
    plan = Plan(source, stored_as, windows[:used], data.batch_size, identity, torch.initial_seed() % 2**31, dropped)
    if trainer.is_global_zero:
        if dropped is not None:
            print(f"ptql: {dropped}")
        if trainer.dry_run_only or not plan.ledger(trainer.run_dir).manifest["blocks"]:
            _dry_run(trainer, model, plan)
    return plan


def _dry_run(trainer: BlockTrainer, model: QuantLM, plan: Plan) -> None:
    attempt = DryRun(
        trainer.run_dir,
        trainer.strategy.root_device,
        trainer.precision_plugin.forward_context(),
        bool(trainer.max_epochs),
    )
    print(f"ptql: {attempt(model, plan.source, plan.stored_as, plan.windows[: plan.batch_size])}")


def _identity(
    trainer: BlockTrainer, model: QuantLM, data: CalibrationData, source: Checkpoint, windows: Tensor
) -> dict[str, Any]:
    tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()  # another tokenizer is another run
    return {
        "source": source.fingerprint(),
        "data": {**data.identity(), "tokens_sha256": tokens},
        "recipe": model.identity(),
        "max_epochs": trainer.max_epochs,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip": [trainer.gradient_clip_val, trainer.gradient_clip_algorithm],
        "limit_train_batches": trainer.limit_train_batches,
        "precision": f"{trainer.precision}, matmul {model.matmul}",
        "processes": trainer.world_size,
    }

"""What of a run in three stages is checked before the first one begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ptql.calibration.bit_budget import BitBudget
from ptql.calibration.data import CalibrationData
from ptql.calibration.ledger import FOLDER
from ptql.calibration.quant_lm import QuantLM
from ptql.errors import InputError
from ptql.restoration.dense import why_not_dense
from ptql.restoration.restore import FIRST, RESTORED, Stage

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer
    from ptql.callbacks.restore_lora import LoRARestoration


def check_passes(run: Path, restoration: LoRARestoration | None, budget: BitBudget | None) -> None:
    """Refuse a directory that holds a run of another number of passes."""
    if restoration is None:
        if (run / FIRST).exists():
            raise InputError(
                f"{run}: holds a run of three stages, and without LoRARestoration there is one; give another "
                "--trainer.default_root_dir, or leave the callback in"
            )
        return
    if budget is not None:
        raise InputError("bits_budget with LoRARestoration: bits are chosen for one pass; leave one of them out")
    if (run / FOLDER).exists() and not (run / FIRST).exists():
        raise InputError(
            f"{run}: holds a run of one pass, and with LoRARestoration there are three stages; give another "
            "--trainer.default_root_dir, or leave the callback out"
        )


def first_stage(trainer: BlockTrainer, restoration: LoRARestoration, model: QuantLM, data: CalibrationData) -> Stage:
    """The restoring stage of a `fit`, before its first pass; `InputError` if something would not go together."""
    source = model.open()
    stored_as = model.packed_format(source, model.added_biases(source.block(0), source))
    if reason := why_not_dense(stored_as):
        raise InputError(
            f"LoRARestoration with a recipe that leaves {reason}: nothing can be merged into such a model; use a "
            "recipe without them (`learn_shift: false`)"
        )
    stage = Stage(restoration, trainer, source, trainer.run_dir / RESTORED, data.text)
    stage.check_room(trainer.run_dir)
    return stage

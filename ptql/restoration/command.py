"""`ptql restore`: which run, where to, and how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from ptql.calibration.data import CalibrationData
from ptql.calibration.quant_lm import QuantLM
from ptql.callbacks.restore_lora import LoRARestoration
from ptql.checkpoint import Checkpoint, resolve
from ptql.errors import InputError
from ptql.evaluation.recorded_run import CONFIG, MODEL, source_of
from ptql.parse_errors import told_as_input
from ptql.restoration.restore import FIRST, RESTORED, Stage

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer


def check_restore_options(trainer: BlockTrainer, model: QuantLM, data: CalibrationData | None) -> None:
    """Refuse what `restore` does not read: it has the run's model, and text and steps of its own."""
    for name, usual, own in (
        ("accumulate_grad_batches", 1, "accumulate"),
        ("gradient_clip_val", None, "gradient_clip"),
    ):
        if (value := getattr(trainer, name)) != usual:
            raise InputError(
                f"{name}={value}: LoRA has a setting of its own; use --trainer.callbacks.{own}, and leave this one out"
            )
    if data is not None and data.settings() != CalibrationData().settings():
        raise InputError(
            "data: these are the windows to calibrate on; the text to learn on is --trainer.callbacks.text"
        )
    if model.source is not None or model.identity() != QuantLM().identity():
        raise InputError("model: what is restored is a finished run's model, as it is; give --run RUN alone")


def recorded_stage(
    trainer: BlockTrainer, given: LoRARestoration | None, run: str | None, out: str | None
) -> tuple[Stage, Path]:
    """The stage, and the run on whose model it learns."""
    if run is None:
        raise InputError("--run is missing: say which run's model is restored")
    whole = Path(run)
    first = whole / FIRST
    if first.is_dir():
        if out is not None:
            raise InputError(f"out={out}: {run} is a run of three stages, and has its own place for it; leave it out")
        folder = whole / RESTORED
    else:
        if out is None:
            raise InputError(f"--out is missing: say where the restored model of {run} shall lie")
        first, folder = whole, Path(out)
    if not (first / MODEL).is_dir():
        raise InputError(f"{first}: no finished run, it has no {MODEL}/; let `ptql fit` finish it")
    says = _configuration(first / CONFIG)
    settings = given or _recorded(says, first / CONFIG) or LoRARestoration()
    source = Checkpoint(resolve(source_of(first)))
    stage = Stage(settings, trainer, source, folder, str((says.get("data") or {}).get("text", "pydoc")))
    stage.check_first(first)
    stage.check_room(folder)
    return stage, first


def _configuration(config: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(config.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"{config}: can't be read ({' '.join(str(error).split())}); restore the file") from None


def _recorded(says: dict[str, Any], config: Path) -> LoRARestoration | None:
    """The callback of the run's configuration; None if it has none."""
    callbacks = (says.get("trainer") or {}).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, dict) and str(callback.get("class_path", "")).endswith("LoRARestoration"):
            with told_as_input():
                parser = LightningArgumentParser(exit_on_error=False)
                parser.add_class_arguments(LoRARestoration, "restoration")
                made = parser.instantiate_classes(parser.parse_object({"restoration": callback.get("init_args", {})}))
            return made["restoration"]
    return None

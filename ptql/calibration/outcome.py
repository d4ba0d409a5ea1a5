"""What a finished fit says of itself: metrics.json, the report, a line."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ptql import __version__
from ptql.calibration.bit_choice import bits_found
from ptql.calibration.preparation import Plan
from ptql.calibration.quant_lm import QuantLM
from ptql.callbacks.checkpoint import BlockCheckpoint
from ptql.evaluation.recorded_run import METRICS, MODEL
from ptql.evaluation.report import REPORT, write_report
from ptql.evaluation.results import merge_metrics
from ptql.evaluation.size import model_size
from ptql.restoration.restored import restoration_of, restored_by

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer


def write_results(trainer: BlockTrainer, model: QuantLM, plan: Plan, seconds: float) -> None:
    """Into the run's directory, beside its finished model; arguments as of `fit_metrics`."""
    run = trainer.run_dir
    size = model_size(run / MODEL, plan.source)
    fit = fit_metrics(trainer, model, plan, seconds)
    bits = {} if plan.bits is None else {"bits": bits_found(trainer, plan)}
    merge_metrics(run / METRICS, {**size, **bits, **restored_by(plan.source.directory), "fit": fit})
    write_report(run)
    print(
        f"{run / MODEL}: {size['bits_per_weight']:.3f} bits per quantised weight, "
        f"{size['bits_per_weight_with_embeddings']:.3f} with embeddings, {size['size_bytes'] / 1e6:.1f} MB; "
        f"checksum {fit['checksum']}; {run / REPORT} shows it"
    )


def fit_metrics(trainer: BlockTrainer, model: QuantLM, plan: Plan, seconds: float) -> dict[str, Any]:
    """The section `fit`: sums over all blocks, by this process or earlier ones.

    Args:
        trainer: After the last block.
        model: The recipe.
        plan: Of this run.
        seconds: That this process took; blocks that earlier ones finished are not in it.
    """
    blocks = [trainer.ledger.summary(index) or {} for index in range(trainer.num_blocks)]
    device = trainer.strategy.root_device
    fit: dict[str, Any] = {
        "method": model.method,
        "source": str(Path(model.source or "").absolute()) if Path(model.source or "").exists() else model.source,
        "blocks": trainer.num_blocks,
        "seconds": round(sum(block["seconds"] for block in blocks), 1),
        "seconds_learning": round(sum(block["seconds_learning"] for block in blocks), 1),
        "seconds_this_process": round(seconds, 1),
        "seconds_saving_this_process": round(_saving(trainer), 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": trainer.world_size,
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")} | {"ptql": __version__},
        "skipped_steps": sum(block.get("skipped_steps", 0) for block in blocks),
        "fell_back": sum(block["fell_back"] for block in blocks),
        "last_block_mse": blocks[-1]["mse"],
        "peak_host_bytes": max(block.get("peak_host_bytes", 0) for block in blocks),
        "checksum": trainer.ledger.checksum(),
        "warnings": _warnings(plan, blocks),
    }
    if restored := restoration_of(plan.source.directory):
        fit["original"] = restored.get("source")
    if peaks := [block["peak_gpu_bytes"] for block in blocks if "peak_gpu_bytes" in block]:
        fit["peak_gpu_bytes"] = max(peaks)
    return fit


def _saving(trainer: BlockTrainer) -> float:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return trainer.ledger.seconds + sum(c.seconds for c in callbacks if isinstance(c, BlockCheckpoint))


def _warnings(plan: Plan, blocks: list[dict[str, Any]]) -> list[str]:
    found = [] if plan.dropped is None else [plan.dropped]
    for index, block in enumerate(blocks):
        if block["fell_back"]:
            found.append(f"block {index}: learning ended worse than it began; the start was kept")
        if skipped := block.get("skipped_steps"):
            found.append(f"block {index}: {skipped} steps had gradients that are not finite and were skipped")
        found += [f"block {index}: {name}: {remark}" for name, remark in block.get("remarks", {}).items()]
    return found

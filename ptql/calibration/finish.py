"""The end of a block: encode it, measure what was encoded, and keep the start if learning made it worse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.ledger import BlockRecord
from ptql.calibration.statistics import observe_inputs
from ptql.families import BlockLayout
from ptql.parts.objectives import Targets, total
from ptql.parts.transforms import InputRange


def finish_block(
    task: BlockTask, streams: Streams, layout: BlockLayout, before: dict[str, InputRange]
) -> tuple[BlockRecord, Tensor]:
    """Encode the block with what was learned, or with its initial values where those lose less.

    Args:
        task: Holds what was learned.
        streams: Stand before the block; hold its targets.
        layout: Of the block.
        before: Ranges in the full-precision block, by linear layer.

    Returns:
        The block as it goes into the ledger, and what it makes of the quantised stream, [samples, tokens, hidden].
    """
    streams.ranks.copy_from_first(task.learnables().values())  # equal already; what is stored must be
    learned, output = _candidate(task, streams, layout)
    learned.summary["fell_back"] = False
    if not learned.learned:
        learned.summary["loss_start"] = learned.summary["loss"]
        kept = learned
    else:
        best = {name: value.clone() for name, value in task.learnables().items()}
        task.load_learnables(task.initial)
        start, start_output = _candidate(task, streams, layout)
        if math.isfinite(learned.summary["loss"]) and not learned.summary["loss"] > start.summary["loss"]:
            task.load_learnables(best)
            kept = learned
        else:
            kept, output = start, start_output
            kept.summary["fell_back"] = True
        kept.summary["loss_start"] = start.summary["loss"]
        kept.summary["skipped_steps"] = task.skipped_steps
    if task.best_epoch is not None:
        kept.summary |= {"loss_learned": task.best_loss, "best_epoch": task.best_epoch}
    kept.summary["layers"] = _weight_errors(task, kept)
    kept.ranges |= {f"before.{group[0]}": before[group[0]].absmax for group in layout.linears}
    return kept, output


@torch.no_grad()
def _candidate(task: BlockTask, streams: Streams, layout: BlockLayout) -> tuple[BlockRecord, Tensor]:
    stored = task.encode()
    with observe_inputs(task.student, layout, streams.quantised.shape[1], streams.ranks) as observed:
        output = streams.output(task.student, task.decode(stored))
    after = observed()
    ranges = {f"after.{group[0]}": after[group[0]].absmax for group in layout.linears}
    learned = {name: value.clone() for name, value in task.learnables().items()}
    measured = torch.tensor([_loss(task, streams, output), _mse(streams, output)], dtype=torch.float64)
    loss, mse = streams.ranks.mean(measured).tolist()
    return BlockRecord(stored, learned, ranges, {"loss": loss, "mse": mse}), output


@torch.no_grad()
def _weight_errors(task: BlockTask, block: BlockRecord) -> dict[str, float]:
    """Squared error of each quantised matrix, relative to that of the matrix as folded: 0 is exact, 1 is all lost."""
    folded, decoded = task.folded_weights(), task.decode(block.stored)
    errors = {}
    for name in task.quantised:
        weight, rounded = folded[f"{name}.weight"], decoded[f"{name}.weight"]
        errors[name] = ((weight - rounded).square().sum() / weight.square().sum()).item()
    return errors


def _loss(task: BlockTask, streams: Streams, output: Tensor) -> float:
    """Mean over batches of the objective, as in training."""
    device, summed = task.device, 0.0
    batches = streams.batches()
    for index, batch in enumerate(batches):
        start = index * batches.batch_size
        chunk = output[start : start + batches.batch_size].to(device)
        targets: Targets = {name: batch[name].to(device) for name in task.objective.targets}
        summed += total(task.objective.terms(chunk, targets)).item()
    return summed / len(batches)


def _mse(streams: Streams, output: Tensor) -> float:
    """Mean squared error against the fp stream: the same figure for every method."""
    target = streams.targets["fp"]
    return sum(torch.mean((a - b) ** 2).item() for a, b in zip(output, target, strict=True)) / len(output)

"""The end of a block: encode it, measure what was encoded, and keep the start if learning made it worse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.input_moments import InputMoments
from ptql.calibration.ledger import BlockRecord
from ptql.calibration.statistics import observe_inputs
from ptql.families import BlockLayout
from ptql.parts.inputs import InputRange
from ptql.parts.objectives import all_terms, total


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
    output = streams.empty()
    learned = _candidate(task, streams, layout, output)
    learned.summary["fell_back"] = False
    if not learned.learned:
        learned.summary["loss_start"] = learned.summary["loss"]
        kept = learned
    else:
        best = {name: value.clone() for name, value in task.learnables().items()}
        task.load_learnables(task.initial)
        start = _candidate(task, streams, layout, None)
        if math.isfinite(learned.summary["loss"]) and not learned.summary["loss"] > start.summary["loss"]:
            task.load_learnables(best)
            kept = learned
        else:  # seldom, so that its output is made again rather than kept beside the other
            kept = _candidate(task, streams, layout, output)
            kept.summary["fell_back"] = True
        kept.summary["loss_start"] = start.summary["loss"]
        kept.summary["skipped_steps"] = task.skipped_steps
    if task.best_epoch is not None:
        kept.summary |= {"loss_learned": task.best_loss, "best_epoch": task.best_epoch}
        kept.summary["epoch_losses"] = [float(f"{loss:.6g}") for loss in task.epoch_losses]
    kept.summary["layers"] = task.weight_errors(kept.stored)
    for group in layout.linears:
        kept.ranges[f"before.{group[0]}"] = before[group[0]].absmax
        kept.ranges[f"mean.{group[0]}"] = before[group[0]].mean
    return kept, output


@torch.no_grad()
def _candidate(task: BlockTask, streams: Streams, layout: BlockLayout, out: Tensor | None) -> BlockRecord:
    """Encode what the task holds and measure what was encoded: mean of the objective over training batches, and mean
    squared error against the fp stream over samples, the same figure for every method. `out` gets the outputs."""
    stored = task.encode(InputMoments(task.student, layout, streams) if task.wants_moments else None)
    remarks = task.remarks()
    losses, squares = [], []
    with observe_inputs(task.student, layout, streams.quantised.shape[1], streams.ranks) as observed:
        for batch in streams.compared(task.student, task.decode(stored), out, task.probe):
            losses.append(total(all_terms(task.objective, batch)))
            squares.append((batch["output"] - batch["fp"]).square().mean((1, 2)))
    after = observed()
    ranges = {f"after.{group[0]}": after[group[0]].absmax for group in layout.linears}
    learned = {name: value.clone() for name, value in task.learnables().items()}
    means = [torch.stack(losses).double().mean(), torch.cat(squares).double().mean()]
    loss, mse = streams.ranks.mean(torch.stack(means)).tolist()
    summary: dict[str, Any] = {"loss": loss, "mse": mse}
    return BlockRecord(stored, learned, ranges, summary | ({"remarks": remarks} if remarks else {}))

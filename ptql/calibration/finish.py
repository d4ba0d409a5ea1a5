"""The end of a block: encode it, measure what was encoded, and keep the start if learning made it worse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.parts.objectives import Targets


@dataclass
class FinishedBlock:
    """A block as it goes into the ledger.

    Args:
        stored: Tensors by name in the block, packed.
        learned: Learnables by name.
        output: What the encoded block makes of the quantised stream, [samples, tokens, hidden].
        summary: Losses of the encoded block before and after learning, and what happened; JSON numbers.
    """

    stored: dict[str, Tensor]
    learned: dict[str, Tensor]
    output: Tensor
    summary: dict[str, float | int | bool]


def finish_block(task: BlockTask, streams: Streams) -> FinishedBlock:
    """Encode the block with what was learned, or with its initial values where those lose less."""
    learned = _candidate(task, streams)
    learned.summary["fell_back"] = False
    if not learned.learned:
        learned.summary["loss_start"] = learned.summary["loss"]
        return learned
    best = {name: value.clone() for name, value in task.learnables().items()}
    task.load_learnables(task.initial)
    start = _candidate(task, streams)
    if learned.summary["loss"] <= start.summary["loss"]:  # false for nan, too
        task.load_learnables(best)
        kept = learned
    else:
        kept = start
        kept.summary["fell_back"] = True
    kept.summary["loss_start"] = start.summary["loss"]
    kept.summary["skipped_steps"] = task.skipped_steps
    return kept


@torch.no_grad()
def _candidate(task: BlockTask, streams: Streams) -> FinishedBlock:
    stored = task.encode()
    output = streams.output(task.student, task.decode(stored))
    learned = {name: value.clone() for name, value in task.learnables().items()}
    return FinishedBlock(stored, learned, output, {"loss": _loss(task, streams, output), "mse": _mse(streams, output)})


def _loss(task: BlockTask, streams: Streams, output: Tensor) -> float:
    """Mean over batches of the objective, as in training."""
    device, total = task.device, 0.0
    batches = streams.batches()
    for index, batch in enumerate(batches):
        start = index * batches.batch_size
        chunk = output[start : start + batches.batch_size].to(device)
        targets: Targets = {name: batch[name].to(device) for name in task.objective.targets}
        total += torch.stack(list(task.objective.terms(chunk, targets).values())).sum().item()
    return total / len(batches)


def _mse(streams: Streams, output: Tensor) -> float:
    """Mean squared error against the fp stream: the same figure for every method."""
    target = streams.targets["fp"]
    return sum(torch.mean((a - b) ** 2).item() for a, b in zip(output, target, strict=True)) / len(output)

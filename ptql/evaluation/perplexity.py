"""Perplexity by the usual convention, with one block of the model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torchmetrics import SumMetric

from ptql.calibration.activations import move, resting_place
from ptql.checkpoint import Checkpoint
from ptql.nn.student import run_block
from ptql.shell import Shell


def token_losses(
    logits: Float[Tensor, "batch tokens vocabulary"], ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Sum of the cross-entropies, in nats, of every token but the first of each window."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def window_losses(
    model: Checkpoint,
    windows: Int[Tensor, "samples tokens"],
    device: torch.device,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Float64[Tensor, " samples"]:
    """Sum over the predicted tokens of each window of -log p, in nats; each window is read on its own, in float32.

    Args:
        model: Full precision, or packed by ptql (its blocks are unpacked one at a time).
        windows: Token ids.
        device: Where blocks run.
        batch_size: Windows at a time.
        progress: Called with (blocks done, blocks in all).
    """
    shell = model.shell().to(device)
    hidden, contexts = embedded(shell, windows, device, batch_size)
    for index, context in enumerate(contexts):
        hidden = run_block(model.block(index, device), hidden, context, batch_size)
        if progress is not None:
            progress(index + 1, model.num_blocks)
    return losses_after_blocks(shell, hidden, windows, device)


@torch.no_grad()
def embedded(
    shell: Shell, windows: Int[Tensor, "samples tokens"], device: torch.device, batch_size: int, streams: int = 2
) -> tuple[Tensor, list[dict]]:
    """Hidden states [samples, tokens, hidden] before block 0, and each block's context.

    They lie on the device if so many streams of their size find room there, else in host memory.
    """
    first, contexts = shell.embed(windows[:1].to(device))
    home = resting_place(first.numel() * 4 * len(windows), device, streams)
    hidden = torch.cat([shell.embed(batch.to(device))[0].to(home) for batch in windows.split(batch_size)])
    return hidden, move(contexts, device)


@torch.no_grad()
def losses_after_blocks(
    shell: Shell, hidden: Float[Tensor, "samples tokens hidden"], windows: Tensor, device: torch.device
) -> Float64[Tensor, " samples"]:
    """As `window_losses`, of hidden states after the last block."""
    losses = []
    for states, window in zip(hidden.split(1), windows.split(1), strict=True):  # one: logits are large
        ids = window.to(device)
        losses.append(token_losses(shell.logits(states.to(device), ids), ids).double())
    return torch.stack(losses)


def perplexity(losses: Float64[Tensor, " samples"], length: int) -> float:
    """exp of the mean loss per predicted token over windows of `length` tokens; infinite where a float ends."""
    total = SumMetric().to(losses.device).set_dtype(torch.float64)
    total.update(losses)
    mean = total.compute().item() / (len(losses) * (length - 1))
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf

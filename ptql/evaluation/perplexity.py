"""Perplexity by the usual convention, with one block of the model in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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
def perplexity(
    model: Checkpoint,
    windows: Int[Tensor, "samples tokens"],
    device: torch.device,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean loss per predicted token over all windows, each read on its own, in float32.

    Args:
        model: Full precision, or packed by ptql (its blocks are unpacked one at a time).
        windows: Token ids.
        device: Where blocks run.
        batch_size: Windows at a time.
        progress: Called with (blocks done, blocks in all).
    """
    shell = model.shell().to(device)
    batches = windows.split(batch_size)
    first, contexts = shell.embed(windows[:1].to(device))
    contexts = move(contexts, device)
    home = resting_place(first.numel() * 4 * len(windows), device)
    hidden = torch.cat([shell.embed(batch.to(device))[0].to(home) for batch in batches])
    for index, context in enumerate(contexts):
        hidden = run_block(model.block(index, device), hidden, context, batch_size)
        if progress is not None:
            progress(index + 1, model.num_blocks)
    return _perplexity_of(shell, hidden, windows, device)


def _perplexity_of(shell: Shell, hidden: Tensor, windows: Tensor, device: torch.device) -> float:
    total = SumMetric().to(device).set_dtype(torch.float64)
    for states, window in zip(hidden.split(1), windows.split(1), strict=True):  # one: logits are large
        ids = window.to(device)
        total.update(token_losses(shell.logits(states.to(device), ids), ids).double())
    return (total.compute() / (windows.shape[0] * (windows.shape[1] - 1))).exp().item()

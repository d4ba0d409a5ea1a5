"""Hidden states of a text on their way through a finished run's model and its source, side by side."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ptql.evaluation.perplexity import embedded
from ptql.evaluation.recorded_run import RecordedRun
from ptql.nn.student import run_block
from ptql.shell import Shell

STREAMS = 7
"""At a time, at most: both models' before the blocks that learn, both between these, two targets, an output."""


@dataclass(frozen=True)
class Standing:
    """What block `block` is about to be given; nobody writes to these tensors.

    Args:
        block: Index of the block, from 0.
        fp: In the full-precision model, [samples, tokens, hidden].
        quantised: In the run's model, of the same shape.
        contexts: Keyword arguments of all blocks.
        seconds: That the full-precision passes took: perplexity alone needs none.
    """

    block: int
    fp: Float[Tensor, "samples tokens hidden"]
    quantised: Float[Tensor, "samples tokens hidden"]
    contexts: list[dict[str, Any]]
    seconds: float = 0.0

    @classmethod
    def at_start(cls, shell: Shell, windows: Int[Tensor, "samples tokens"], device: torch.device, batch: int):
        """Before block 0, where both models have the same embeddings."""
        hidden, contexts = embedded(shell, windows, device, batch, STREAMS)
        return cls(0, hidden, hidden, contexts)

    @torch.no_grad()
    def moved_to(self, block: int, run: RecordedRun, device: torch.device, batch: int) -> Standing:
        """Before a later block, `batch` samples at a time."""
        fp, quantised, seconds = self.fp, self.quantised, self.seconds
        for index in range(self.block, block):
            began, own = time.monotonic(), index > self.block  # what this loop has made is overwritten
            fp = run_block(run.source.block(index, device), fp, self.contexts[index], batch, out=fp if own else None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds += time.monotonic() - began
            packed, out = run.packed.block(index, device), quantised if own else None
            quantised = run_block(packed, quantised, self.contexts[index], batch, out=out)
            if (index + 1) % max(1, block // 5) == 0:
                print(f"both models: block {index + 1}/{block}", file=sys.stderr, flush=True)
        return replace(self, block=block, fp=fp, quantised=quantised, seconds=seconds)

"""What the processes of a run share: each calibrates on its own windows, and all must decide alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run; alone, nothing is sent anywhere.

    Args:
        rank: Of this process, from 0.
        size: Number of processes.
        device: Where tensors lie that are sent; NCCL takes those on a GPU only.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def share(self, samples: Tensor) -> Tensor:
        """This process's samples: every `size`-th one, so that its k-th batch is its part of the k-th global batch.

        What does not divide evenly is dropped at the end: unequal shares would leave a process waiting for ever.
        """
        return samples[: len(samples) // self.size * self.size][self.rank :: self.size]

    def interleaved(self, shares: Tensor) -> Tensor:
        """All samples in the order they had before `share`: [mine, ...] to [mine * size, ...]."""
        if self.size == 1:
            return shares
        mine = shares.to(self.device).contiguous()
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return torch.stack(every, dim=1).flatten(0, 1).to(shares.device)

    def mean(self, values: Tensor) -> Tensor:
        """Element by element, over the processes."""
        return values if self.size == 1 else self._reduced(values, dist.ReduceOp.SUM) / self.size

    def smallest(self, values: Tensor) -> Tensor:
        """Element by element, over the processes."""
        return values if self.size == 1 else self._reduced(values, dist.ReduceOp.MIN)

    def largest(self, values: Tensor) -> Tensor:
        """Element by element, over the processes."""
        return values if self.size == 1 else self._reduced(values, dist.ReduceOp.MAX)

    def any(self, here: bool) -> bool:
        """Whether it is so in one process at least."""
        return here if self.size == 1 else bool(self.largest(torch.tensor(float(here))).item())

    def all(self, here: bool) -> bool:
        """Whether it is so in every process."""
        return here if self.size == 1 else bool(self.smallest(torch.tensor(float(here))).item())

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Make the tensors, in place, those of the first process."""
        for tensor in tensors if self.size > 1 else ():
            sent = tensor.to(self.device).contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        sent = values.to(self.device, copy=True).contiguous()
        dist.all_reduce(sent, how)
        return sent.to(values.device)

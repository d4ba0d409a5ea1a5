"""What the processes of a run share: each calibrates on its own windows, and all must decide alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

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
        host: The same processes by way of host memory, if there is one: what is asked in each step goes there, so
            that nobody waits for a GPU.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: dist.ProcessGroup | None = None

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
        return here if self.size == 1 else self._counted(here) > 0

    def all(self, here: bool) -> bool:
        """Whether it is so in every process."""
        return here if self.size == 1 else self._counted(here) == self.size

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Make the tensors, in place, those of the first process."""
        for tensor in tensors if self.size > 1 else ():
            sent = tensor.to(self.device).contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)

    def _counted(self, here: bool) -> int:
        count = torch.tensor(int(here), device=self.device if self.host is None else "cpu")
        dist.all_reduce(count, group=self.host)
        return int(count)

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        sent = values.to(self.device, copy=True).contiguous()
        dist.all_reduce(sent, how)
        return sent.to(values.device)


def host_group(nodes: int) -> dist.ProcessGroup | None:
    """The processes of a run by way of host memory, where that can't fail: on one machine, whatever else they use."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if nodes == 1 else None

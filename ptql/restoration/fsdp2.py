"""Sharded weights for models larger than one GPU."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy


class FSDP2(ModelParallelStrategy):
    """Each of all processes holds an equal part of every weight (`torch.distributed.fsdp.fully_shard`), and samples of
    its own. Lightning's strategy would spread tensors within a host instead, and samples over hosts only."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_processes * self.num_nodes, 1
        if self.lightning_module is None:  # the run's own trainer: it needs the processes, and has no model
            self._setup_distributed()
        else:
            super().setup_environment()

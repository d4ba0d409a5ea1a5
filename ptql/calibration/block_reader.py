"""The next block's tensors, read from the disk while work on a block goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ptql.checkpoint import Checkpoint


class BlockReader:
    """Gives blocks of a model, read ahead where told so; at most one waits in host memory.

    Args:
        source: The model.
        device: Where blocks are built. For a GPU, tensors wait in pinned memory, which is copied faster.
    """

    def __init__(self, source: Checkpoint, device: torch.device) -> None:
        self._source, self._device = source, device
        self._reader = ThreadPoolExecutor(1, "ptql-read")
        self._coming: tuple[int, Future[dict[str, Tensor]]] | None = None

    def ahead(self, index: int) -> None:
        """Begin to read block `index` in the place of any other; nothing happens if there is no such block."""
        if index >= self._source.num_blocks or (self._coming and self._coming[0] == index):
            return
        self._forget()
        # The names here: the first look at a model's modules builds them, which no other thread may see half done.
        self._coming = index, self._reader.submit(self._read, self._source.block_names(index))

    def block(self, index: int) -> nn.Module:
        """Block `index` in float32 on the device.

        Raises:
            InputError: A file that is damaged, or lacks a tensor.
        """
        if self._coming and self._coming[0] == index:
            coming, self._coming = self._coming[1], None
            tensors = coming.result()
        else:
            tensors = self._source.read_block(index)
        return self._source.build_block(index, tensors, self._device)

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; what it has read is let go."""
        self._forget()
        self._reader.shutdown()

    def _forget(self) -> None:
        if self._coming:
            self._coming[1].cancel()
            self._coming = None

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        if self._device.type != "cuda":
            return dict(self._source.read(names))
        with torch.cuda.device(self._device):  # a thread begins on the first GPU
            return {name: tensor.pin_memory() for name, tensor in self._source.read(names)}

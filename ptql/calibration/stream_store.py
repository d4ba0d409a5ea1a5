"""The tensors that hold a stream of hidden states: on the device, in host memory, or in files of the run directory."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ptql.calibration.memory_budget import Place


class StreamStore:
    """Makes streams, all in one place. A stream lives as long as its tensor.

    On disk, a stream is a tensor whose memory is a mapped file. The file has no name any more once it is mapped, so
    its room comes back with the tensor's end, however the process ends; a process that is killed before that leaves a
    file, which the next one removes.

    Args:
        place: Where streams lie.
        device: The one that blocks run on.
        folder: Holds the files of streams on disk; there already.
        rank: Of this process, among those that share the folder.
    """

    def __init__(self, place: Place, device: torch.device, folder: Path | None = None, rank: int = 0) -> None:
        self.place: Place = place
        self.device = device
        self._folder, self._prefix = folder, f".stream-{rank}-"
        self.remove_left_over()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A stream of this shape, its content arbitrary.

        Raises:
            OSError: No room on the disk.
        """
        if self.place == "disk":
            return self._on_disk(shape, dtype)
        if self.place == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")  # copies run beside the work

    def _on_disk(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self._folder is not None
        count = math.prod(shape)
        handle, name = tempfile.mkstemp(prefix=self._prefix, dir=self._folder)
        try:
            _reserve(handle, count * dtype.itemsize)
            return torch.from_file(name, shared=True, size=count, dtype=dtype).view(shape)
        finally:
            os.close(handle)
            with suppress(PermissionError):  # Windows keeps the names of mapped files
                os.unlink(name)

    def remove_left_over(self) -> None:
        """Remove the files of an earlier process that was killed."""
        for path in self._folder.glob(f"{self._prefix}*") if self._folder is not None else ():
            with suppress(PermissionError):
                path.unlink(missing_ok=True)


def _reserve(handle: int, count: int) -> None:
    """Give a file its size, and room on the disk: a write into a map where there is none kills the process."""
    try:
        os.posix_fallocate(handle, 0, count)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        _fill(handle, count)  # macOS has no such call, some file systems don't know it


def _fill(handle: int, count: int) -> None:
    zeros = bytes(1 << 20)
    while count > 0:
        count -= os.write(handle, zeros[:count])

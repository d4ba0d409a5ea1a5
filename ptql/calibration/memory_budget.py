"""How much memory a run may take, and what follows from it: where the streams of hidden states lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from ptql.calibration.memory import host_bytes
from ptql.errors import InputError
from ptql.kernels.available import power_of_two

Place = Literal["device", "host", "disk"]

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
CONTEXT_BYTES = 600 * 2**20  # of a GPU, that CUDA and its libraries take beside PyTorch's tensors
SHARE_OF_FREE = 0.9  # of what is free on a GPU; the rest is for gaps between tensors
SHARE_OF_HOST = 0.8  # of all host memory; the rest is for a block, the program, and the system
SHARE_OF_WORK = 0.5  # of a GPU's memory, left to the work on a block where nobody has measured it


def parse_bytes(name: str, text: str) -> int:
    """The number of bytes that an option such as `8GiB` names.

    Raises:
        InputError: No number above 0 with a unit right behind it.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT]i?B)", str(text), re.ASCII)
    if found is None or (count := int(float(found[1]) * UNITS[found[2]])) < 1:
        raise InputError(
            f"{name}={text}: a number above 0 and its unit, one of {', '.join(UNITS)}; use --data.{name} 8GiB"
        )
    return count


def resting_place(
    stream_bytes: int, streams: int, work_bytes: int, gpu_bytes: int | None, host_bytes: int | None
) -> Place:
    """Where all streams lie: on the device while they fit beside the work, else in host memory, else on disk.

    Args:
        stream_bytes: Of one stream.
        streams: How many there are at a time.
        work_bytes: What work on a block takes on the GPU.
        gpu_bytes: What all of it may take on the GPU; None without a GPU.
        host_bytes: What streams may take of host memory; None where nobody knows.
    """
    if gpu_bytes is not None and streams * stream_bytes + work_bytes <= gpu_bytes:
        return "device"
    return "host" if host_bytes is None or streams * stream_bytes <= host_bytes else "disk"


@dataclass(frozen=True)
class Budget:
    """The memory that each process of a run may take.

    Args:
        memory: Bytes of its GPU, all in; None for what is free there.
        host_memory: Bytes of host memory that the streams of all processes of a machine may take; None for most of it.
        processes: Of this machine.
    """

    memory: int | None = None
    host_memory: int | None = None
    processes: int = 1

    def place(self, device: torch.device, stream_bytes: int, streams: int, work_bytes: int | None = None) -> Place:
        """Where streams of this size lie for a process that works on `device`."""
        host = self._host_bytes()
        if device.type != "cuda":
            return resting_place(stream_bytes, streams, 0, None, host)
        gpu = self._gpu_bytes(device)
        if work_bytes is None:
            work_bytes = int(gpu * SHARE_OF_WORK)
        elif self.memory is not None and (needed := work_bytes + CONTEXT_BYTES) > self.memory:
            raise InputError(
                f"memory={_gib(self.memory)}: work on a block takes {_gib(needed)} of the GPU; leave --data.memory "
                "out, or use a smaller --data.batch_size or --data.length"
            )
        place = resting_place(stream_bytes, streams, work_bytes, gpu, host)
        # PyTorch's pinned memory comes in powers of two
        return place if place == "device" else resting_place(power_of_two(stream_bytes), streams, 0, None, host)

    def check_work(self, work_bytes: int) -> None:
        """Raise `InputError` if work on a block alone takes more than the GPU's memory that was granted."""
        if self.memory is not None and work_bytes + CONTEXT_BYTES > self.memory:
            raise InputError(
                f"memory={_gib(self.memory)}: work on a block takes {_gib(work_bytes + CONTEXT_BYTES)} of the GPU; "
                "leave --data.memory out, or use a smaller --data.batch_size or --data.length"
            )

    def _gpu_bytes(self, device: torch.device) -> int:
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # for tensors to come
        room = int((free + kept) * SHARE_OF_FREE)
        return room if self.memory is None else min(room, self.memory - CONTEXT_BYTES)

    def _host_bytes(self) -> int | None:
        total = host_bytes()
        granted = self.host_memory
        if granted is None and total is not None:
            granted = int(total * SHARE_OF_HOST)
        return None if granted is None else granted // self.processes


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g}GiB"

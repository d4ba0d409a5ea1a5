"""Streams in each place: the same tensors, and nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptql.calibration import stream_store
from ptql.calibration.memory_budget import Place
from ptql.calibration.stream_store import StreamStore

CPU = torch.device("cpu")
SHAPE = (3, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_stream_holds_what_is_written(tmp_path: Path, place: Place, dtype: torch.dtype) -> None:
    store = StreamStore(place, CPU, tmp_path)
    content = torch.randn(SHAPE).to(dtype)
    streams = [store.empty(SHAPE, dtype) for _ in range(3)]
    for k, stream in enumerate(streams):
        stream.copy_(content + k)
    for k, stream in enumerate(streams):
        assert (stream.shape, stream.dtype, stream.device) == (SHAPE, dtype, CPU)
        assert stream.is_contiguous()
        assert torch.equal(stream, content + k)


def test_a_stream_on_disk_takes_room_there_while_it_lives(tmp_path: Path) -> None:
    store, count = StreamStore("disk", CPU, tmp_path), 64 << 20
    before = os.statvfs(tmp_path)
    stream = store.empty((count,), torch.uint8)
    during = os.statvfs(tmp_path)
    stream[::4096] = 1
    assert (before.f_bfree - during.f_bfree) * before.f_frsize > count // 2  # others use the disk, too
    assert list(tmp_path.iterdir()) == []
    del stream
    assert (os.statvfs(tmp_path).f_bfree - during.f_bfree) * before.f_frsize > count // 2


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from ptql.calibration.stream_store import StreamStore
os.unlink = lambda name: os.kill(os.getpid(), signal.SIGKILL)
StreamStore("disk", torch.device("cpu"), Path(sys.argv[1]), int(sys.argv[2])).empty((1000,), torch.float32)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    for rank in (1, 11):
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(rank)], timeout=120)
        assert done.returncode == -9
    assert len(list(tmp_path.iterdir())) == 3
    StreamStore("host", CPU, tmp_path, rank=1)  # wherever streams lie now
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert left[0].startswith(".stream-11-")
    assert left[1] == "config.yaml"


def test_no_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    store = StreamStore("disk", CPU, tmp_path)
    with pytest.raises(OSError) as caught:  # noqa: PT011  (the number is what counts)
        store.empty((2**50,), torch.float32)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_files_are_filled_where_the_system_can_not_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refuse(handle: int, start: int, count: int) -> None:
        raise OSError(number, "no")

    if number is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    count = (5 << 20) // 2 + 3
    stream = StreamStore("disk", CPU, tmp_path).empty((count,), torch.bfloat16)
    assert not stream.any()
    with open(tmp_path / "file", "wb") as file:
        stream_store._reserve(file.fileno(), count)
    assert (tmp_path / "file").stat().st_size == count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_host_memory_beside_a_gpu_is_pinned(tmp_path: Path) -> None:
    cuda = torch.device("cuda", 0)
    assert StreamStore("host", cuda).empty(SHAPE, torch.bfloat16).is_pinned()
    assert StreamStore("device", cuda).empty(SHAPE, torch.bfloat16).device == cuda
    assert not StreamStore("disk", cuda, tmp_path).empty(SHAPE, torch.bfloat16).is_pinned()

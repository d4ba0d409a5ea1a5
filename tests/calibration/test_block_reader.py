"""Blocks that are read ahead are the blocks that are read now; errors come when the block is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ptql.calibration.block_reader import BlockReader
from ptql.checkpoint import SINGLE, Checkpoint
from ptql.errors import InputError
from tests.models import llama_config, random_model, save

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(random_model(llama_config(num_hidden_layers=3)).to(torch.bfloat16), tmp_path / "model")


@pytest.fixture
def source(directory: Path) -> Checkpoint:
    return Checkpoint(directory)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Reads:
    """Notes in which thread a checkpoint is read, and may hold it up."""

    def __init__(self, source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here: list[bool] = []
        self.go = threading.Event()
        self.go.set()
        self._read: Callable[[list[str]], Iterator[tuple[str, Tensor]]] = source.read
        monkeypatch.setattr(source, "read", self)

    def __call__(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        self.here.append(threading.current_thread() is threading.main_thread())
        assert self.go.wait(60)
        return self._read(names)


def test_blocks_in_order_are_read_in_a_thread(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [source.block(index) for index in range(3)]
    reads = Reads(source, monkeypatch)
    with closing(BlockReader(source, CPU)) as reader:
        reader.ahead(0)
        for index in range(3):
            block = reader.block(index)
            reader.ahead(index + 1)  # of the last block: nothing
            assert same(block, expected[index])
    assert reads.here == [False] * 3


def test_a_block_that_was_not_read_ahead_is_read_now(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [source.block(index) for index in range(3)]
    reads = Reads(source, monkeypatch)
    with closing(BlockReader(source, CPU)) as reader:
        assert same(reader.block(1), expected[1])
        reader.ahead(2)
        reader.ahead(2)
        assert same(reader.block(0), expected[0])
        assert same(reader.block(2), expected[2])
        assert same(reader.block(2), expected[2])  # given away: read again
    assert sorted(reads.here) == [False, True, True, True]


def test_another_block_takes_the_place_of_the_one_ahead(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [source.block(index) for index in range(3)]
    reads = Reads(source, monkeypatch)
    with closing(BlockReader(source, CPU)) as reader:
        reads.go.clear()
        reader.ahead(0)
        reader.ahead(1)  # while 0 is being read
        reader.ahead(2)  # 1 has not begun
        reads.go.set()
        assert same(reader.block(2), expected[2])
        assert same(reader.block(0), expected[0])
    assert reads.here == [False, False, True]


def test_a_block_is_waited_for(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, reads = source.block(1), Reads(source, monkeypatch)
    with closing(BlockReader(source, CPU)) as reader:
        reads.go.clear()
        reader.ahead(1)  # comes back at once
        threading.Timer(0.2, reads.go.set).start()
        assert same(reader.block(1), expected)
    assert reads.here == [False]


def test_a_damaged_file_is_told_when_the_block_is_asked_for(directory: Path, source: Checkpoint) -> None:
    expected = source.block(1)
    whole = (directory / SINGLE).read_bytes()
    with closing(BlockReader(source, CPU)) as reader:
        (directory / SINGLE).write_bytes(whole[: len(whole) // 2])
        reader.ahead(1)
        with pytest.raises(InputError, match=r"model\.safetensors: damaged .*fetch the model again"):
            reader.block(1)
        (directory / SINGLE).write_bytes(whole)
        reader.ahead(1)
        assert same(reader.block(1), expected)


def test_the_end_does_not_wait_for_what_nobody_wants(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(source, monkeypatch)
    reader = BlockReader(source, CPU)
    reads.go.clear()
    reader.ahead(0)
    reader.ahead(1)
    threading.Timer(0.2, reads.go.set).start()
    reader.close()
    assert reads.here == [False]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ptql-read")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_blocks_for_a_gpu_wait_in_pinned_memory(source: Checkpoint) -> None:
    cuda = torch.device("cuda", 0)
    with closing(BlockReader(source, cuda)) as reader:
        reader.ahead(0)
        assert reader._coming is not None
        assert all(tensor.is_pinned() for tensor in reader._coming[1].result().values())
        for index in range(3):
            block = reader.block(index)
            reader.ahead(index + 1)
            assert {parameter.device for parameter in block.parameters()} == {cuda}
            assert same(block.to(CPU), source.block(index))

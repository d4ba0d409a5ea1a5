"""Copies between host and device run through the same code on the CPU, where both ends are host memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.nn import transfer
from ptql.nn.student import run_block
from ptql.nn.transfer import Fetcher, Lane, Writer, batches_on

CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class LateLane(Lane):
    """Copies as late as a GPU might: when somebody waits for them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue: list[tuple[Tensor, Tensor]] = []

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.queue += list(pairs)

    def hold_work(self) -> None:
        super().copy(self.queue)
        self.queue = []

    def wait(self) -> None:
        self.hold_work()


@pytest.fixture(params=[Lane, LateLane])
def far(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lies where it is worked on."""
    monkeypatch.setattr(transfer, "within_reach", lambda tensor, device: False)
    monkeypatch.setattr(transfer, "Lane", request.param)


def some(samples: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    return {name: torch.randn(samples, 3, 4, generator=make).to(dtype) for name in ("input", "fp")}


def expected(tensors: dict[str, Tensor], size: int, first: int = 0) -> list[dict[str, Tensor]]:
    starts = range(first * size, len(tensors["input"]), size)
    return [{name: tensor[k : k + size].float() for name, tensor in tensors.items()} for k in starts]


def equal(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    same = all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True))
    return same and all(tensor.dtype == torch.float32 for batch in a for tensor in batch.values())


def reading() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ptql-")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "first"), [(1, 0), (2, 0), (3, 1), (7, 0), (9, 0), (2, 3), (2, 4)])
def test_what_lies_there_already_is_sliced(dtype: torch.dtype, size: int, first: int) -> None:
    tensors = some(dtype=dtype)
    found = list(batches_on(CPU, tensors, size, torch.float32, first))
    assert equal(found, expected(tensors, size, first))
    if dtype == torch.float32 and found:
        assert found[0]["fp"].data_ptr() == tensors["fp"][first * size].data_ptr()


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "first"), [(1, 0), (2, 0), (3, 1), (7, 0), (9, 0), (2, 3), (2, 4)])
def test_fetched_batches_are_the_same_and_stay(dtype: torch.dtype, size: int, first: int) -> None:
    tensors = some(dtype=dtype)
    found = list(batches_on(CPU, tensors, size, torch.float32, first))  # all of them kept
    assert equal(found, expected(tensors, size, first))
    assert reading() == []


@pytest.mark.usefixtures("far")
def test_the_next_batch_is_fetched_while_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, fetch = threading.Semaphore(0), Fetcher.fetch

    def note(self: Fetcher, start: int) -> None:
        assert threading.current_thread() is not threading.main_thread()
        fetch(self, start)
        fetched.release()

    monkeypatch.setattr(Fetcher, "fetch", note)
    batches = batches_on(CPU, some(), 2, torch.float32)
    next(batches)
    assert fetched.acquire(timeout=60)
    assert fetched.acquire(timeout=60)
    time.sleep(0.1)
    assert not fetched.acquire(blocking=False)  # one ahead, no more
    batches.close()
    assert reading() == []


@pytest.mark.usefixtures("far")
def test_an_error_in_the_thread_reaches_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Fetcher.fetch

    def fail(self: Fetcher, start: int) -> None:
        if start == 2:
            raise OSError(5, "the disk is gone")
        fetch(self, start)

    monkeypatch.setattr(Fetcher, "fetch", fail)
    batches = batches_on(CPU, some(), 2, torch.float32)
    next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert reading() == []


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_batches_arrive(dtype: torch.dtype) -> None:
    content, out = some(20)["input"], torch.zeros(20, 3, 4, dtype=dtype)
    with Writer(out, CPU) as writer:
        for start in range(0, 20, 3):
            batch = content[start : start + 3].clone()
            writer.put(start, batch)
            del batch
    assert torch.equal(out, content.to(dtype))
    assert reading() == []


@pytest.mark.usefixtures("far")
def test_an_error_while_writing_reaches_who_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Writer, target: Tensor, batch: Tensor) -> None:
        raise OSError(28, "no room")

    monkeypatch.setattr(Writer, "_send", fail)

    def write(own: Exception | None = None) -> None:
        with Writer(torch.zeros(4, 3), CPU) as writer:
            writer.put(0, torch.ones(2, 3))
            if own is not None:
                raise own

    with pytest.raises(OSError, match="no room"):
        write()
    with pytest.raises(KeyError, match="own"):  # what came first
        write(KeyError("own"))
    assert reading() == []


class Doubling(torch.nn.Module):
    """Twice the input; what it is given must be of its own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, hidden: Tensor, **context: Any) -> tuple[Tensor]:
        assert hidden.dtype == self.factor.dtype
        return (hidden * self.factor,)


def check_in_place(make: Callable[[Tensor], Tensor], block: torch.nn.Module) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        content = some(20, dtype)["input"]
        hidden = make(content)
        assert torch.equal(run_block(block, hidden, {}, 3).cpu(), content * 2)
        assert torch.equal(hidden.cpu(), content)
        assert run_block(block, hidden, {}, 3, out=hidden) is hidden
        assert torch.equal(hidden.cpu(), content * 2)


def test_a_block_may_write_over_its_input() -> None:
    check_in_place(Tensor.clone, Doubling())


@pytest.mark.usefixtures("far")
def test_a_block_may_write_over_its_input_from_afar() -> None:
    check_in_place(Tensor.clone, Doubling())


# On a GPU


def keep_busy(seconds: float) -> None:
    """Queue work that takes so long, on the current CUDA stream."""
    torch.cuda._sleep(int(seconds * 1e9))


class SlowDoubling(Doubling):
    def forward(self, hidden: Tensor, **context: Any) -> tuple[Tensor]:
        keep_busy(0.02)
        return super().forward(hidden)


@pytest.mark.parametrize("pinned", [pytest.param(True, marks=gpu), pytest.param(False, marks=gpu)])
def test_batches_on_a_gpu_are_those_of_the_host(pinned: bool) -> None:
    cuda = torch.device("cuda", 0)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {name: torch.randn(50, 512, 256).to(dtype) for name in ("input", "fp")}
        host = {name: tensor.pin_memory() if pinned else tensor for name, tensor in tensors.items()}
        there = {name: tensor.to(cuda) for name, tensor in tensors.items()}
        sums = []
        for batch, wanted in zip(
            batches_on(cuda, host, 4, torch.float32), batches_on(cuda, there, 4, torch.float32), strict=True
        ):
            keep_busy(0.02)  # the copy of the next batch must not overtake what reads this one
            sums.append(sum((batch[name] != wanted[name]).sum() for name in tensors))
        assert torch.stack(sums).sum().item() == 0


@pytest.mark.parametrize("pinned", [pytest.param(True, marks=gpu), pytest.param(False, marks=gpu)])
def test_blocks_on_a_gpu_write_over_their_input_in_host_memory(pinned: bool) -> None:
    make = Tensor.pin_memory if pinned else Tensor.clone
    check_in_place(make, SlowDoubling().to("cuda"))


@pytest.mark.parametrize("pinned", [pytest.param(True, marks=gpu), pytest.param(False, marks=gpu)])
def test_copies_do_not_pile_up_on_the_gpu(pinned: bool) -> None:
    hidden = torch.randn(64, 512, 1024, pin_memory=pinned)
    block = Doubling().to("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_block(block, hidden, {}, 1, out=hidden)
    assert torch.cuda.max_memory_allocated() - before < 8 * hidden[0].nbytes

"""Where streams lie, by what there is and what was granted; no test needs a GPU."""

from __future__ import annotations

import pytest
import torch

from ptql.calibration import memory_budget
from ptql.calibration.memory_budget import CONTEXT_BYTES, Budget, parse_bytes, resting_place
from ptql.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 * 2**30), ("500MiB", 500 * 2**20), ("24GB", 24 * 10**9), ("1.5TiB", 3 * 2**39), ("0.5MB", 500_000)],
)
def test_a_number_and_its_unit(text: str, count: int) -> None:
    assert parse_bytes("memory", text) == count


@pytest.mark.parametrize(
    "text",
    ["8", "", "GiB", "8 GiB", "8gib", "8G", "8KiB", "-8GiB", "0GiB", "0.0000001MB", "1e3MB", "8GiB ", "８GiB", "nan"],
)
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(InputError, match=r"^host_memory=.*: a number above 0 and its unit.*--data\.host_memory 8GiB$"):
        parse_bytes("host_memory", text)


@pytest.mark.parametrize(
    ("gpu", "host", "place"),
    [
        (500, None, "device"),
        (499, 400, "host"),
        (499, None, "host"),
        (499, 399, "disk"),
        (-1, 0, "disk"),
        (None, 400, "host"),
        (None, None, "host"),
        (None, 399, "disk"),
    ],
)
def test_on_the_device_while_all_fit_beside_the_work(gpu: int | None, host: int | None, place: str) -> None:
    assert resting_place(100, 4, 100, gpu, host) == place


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GiB, 70 of them free and 10 more kept by this process, and 100 GiB of host memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    monkeypatch.setattr(memory_budget, "host_bytes", lambda: 100 * GIB)


@pytest.mark.usefixtures("machine")
def test_nine_tenths_of_what_is_free_on_the_gpu_hold_streams_and_work() -> None:
    assert Budget().place(CUDA, 16 * GIB, 4, 8 * GIB) == "device"
    assert Budget().place(CUDA, 16 * GIB, 4, 8 * GIB + 1) == "host"
    assert Budget().place(CUDA, 9 * GIB, 4) == "device"  # nobody has measured the work: half is left to it
    assert Budget().place(CUDA, 9 * GIB + 1, 4) == "host"


@pytest.mark.usefixtures("machine")
def test_memory_holds_everything_that_is_on_the_gpu() -> None:
    streams, work = 4 * GIB, 2 * GIB
    granted = streams + work + CONTEXT_BYTES
    assert Budget(granted).place(CUDA, streams // 4, 4, work) == "device"
    assert Budget(granted - 1).place(CUDA, streams // 4, 4, work) == "host"
    assert Budget(10**15).place(CUDA, 16 * GIB, 4, 8 * GIB + 1) == "host"  # granted, but not there
    assert Budget(1).place(CUDA, 1, 4) == "host"
    with pytest.raises(InputError, match=r"^memory=2GiB: work on a block takes 2\.59GiB .*--data\.memory out, or"):
        Budget(2 * GIB).check_work(work)


@pytest.mark.usefixtures("machine")
def test_host_memory_is_shared_by_the_processes_of_a_machine() -> None:
    assert Budget().place(CPU, 20 * GIB, 4) == "host"
    assert Budget().place(CPU, 20 * GIB + 1, 4) == "disk"
    assert Budget(processes=2).place(CPU, 10 * GIB + 1, 4) == "disk"
    assert Budget(host_memory=8 * GIB).place(CPU, 2 * GIB, 4) == "host"
    assert Budget(host_memory=8 * GIB, processes=4).place(CPU, GIB // 2 + 1, 4) == "disk"
    assert Budget(memory=1).place(CPU, 1, 4) == "host"  # of a GPU, which is not there


@pytest.mark.usefixtures("machine")
def test_pinned_memory_is_counted_in_powers_of_two() -> None:
    full = Budget(memory=GIB, host_memory=64 * GIB)
    assert full.place(CUDA, 16 * GIB, 4) == "host"
    assert full.place(CUDA, 16 * GIB + 1, 4) == "disk"
    assert Budget(host_memory=64 * GIB).place(CPU, 16 * GIB, 4) == "host"
    assert Budget(host_memory=66 * GIB).place(CPU, 16 * GIB + 1, 4) == "host"


def test_where_the_system_does_not_tell_how_much_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "host_bytes", lambda: None)
    assert Budget().place(CPU, 10**18, 4) == "host"
    assert Budget(host_memory=GIB).place(CPU, 10**18, 4) == "disk"

"""Shares of samples, and what processes tell each other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptql.calibration.ranks import Ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [4, 7, 12])
def test_shares_make_up_the_samples_again(size: int, samples: int) -> None:
    """Without messages: `interleaved` is the inverse of `share`, on what divides evenly."""
    x = torch.randn(samples, 3)
    shares = [Ranks(rank, size).share(x) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    whole = x[: samples // size * size]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), whole)


@pytest.mark.parametrize(("size", "batch"), [(2, 2), (4, 1), (2, 3)])
def test_the_kth_batches_together_are_the_kth_global_batch(size: int, batch: int) -> None:
    x = torch.arange(24)
    for k in range(24 // size // batch):
        parts = [Ranks(rank, size).share(x)[k * batch : (k + 1) * batch] for rank in range(size)]
        assert sorted(torch.cat(parts).tolist()) == x[k * size * batch : (k + 1) * size * batch].tolist()


def test_alone_nothing_is_sent() -> None:
    """No process group is there, so that any message would raise."""
    ranks, x = Ranks(), torch.randn(3, 2)
    for told in (ranks.share, ranks.interleaved, ranks.mean, ranks.smallest, ranks.largest):
        assert torch.equal(told(x), x)
    assert [ranks.any(True), ranks.any(False), ranks.all(True), ranks.all(False)] == [True, False, True, False]
    ranks.copy_from_first([x])


TWO = """
import json, sys
import torch
import torch.distributed as dist
from ptql.calibration.ranks import Ranks, host_group

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
ranks, by_host = Ranks(rank, 2), Ranks(rank, 2, torch.device("meta"), host_group(1))  # nothing is sent on the device
x = torch.arange(14.0).view(7, 2)
mine = torch.tensor([1.0, 5.0]) if rank == 0 else torch.tensor([3.0, -2.0])
kept = mine.clone()
first = torch.full((2, 3), float(rank)).t()  # not contiguous
said = {
    "interleaved": torch.equal(ranks.interleaved(ranks.share(x)), x[:6]),
    "mean": ranks.mean(mine).tolist(),
    "smallest": ranks.smallest(mine).tolist(),
    "largest": ranks.largest(mine).tolist(),
    "any": [ranks.any(rank == 1), ranks.any(False), ranks.any(True)],
    "all": [ranks.all(rank == 1), ranks.all(False), ranks.all(True)],
    "by host": [by_host.any(rank == 1), by_host.any(False), by_host.all(rank == 1), by_host.all(True)],
    "kept": torch.equal(mine, kept),
    "double": ranks.mean(torch.tensor([1e-12 * (rank + 1)], dtype=torch.float64)).item(),
}
ranks.copy_from_first([first])
said["first"] = first.tolist()
print(json.dumps(said))
dist.destroy_process_group()
"""


def test_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", TWO, str(rank), port] for rank in range(2)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands]
    said = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert said[0] == said[1]
    assert said[0] == {
        "interleaved": True,
        "mean": [2.0, 1.5],
        "smallest": [1.0, -2.0],
        "largest": [3.0, 5.0],
        "any": [True, False, True],
        "all": [False, False, True],
        "by host": [True, False, False, True],
        "kept": True,  # what was given is not changed
        "double": pytest.approx(1.5e-12, rel=1e-12),
        "first": [[0.0, 0.0]] * 3,
    }

"""Random mutations of a valid run: each ends in a complete run, or in one line that says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES, WORKERS = 200, 2


@pytest.mark.slow
def test_every_mutation_ends_well() -> None:
    """Each case is a fork of a process that has imported everything; `python -m tests.fuzz SEED` repeats one."""
    share = CASES // WORKERS
    seeds = [f"{k * share}:{(k + 1) * share}" for k in range(WORKERS)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz"]
    running = [
        subprocess.Popen(
            [*command, part], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for part in seeds
    ]
    said = [process.communicate(timeout=500)[0] for process in running]
    assert [process.returncode for process in running] == [0] * WORKERS, "\n".join(said)
    assert [f"0 of {share} failed" in out for out in said] == [True] * WORKERS

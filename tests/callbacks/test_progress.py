from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ptql.callbacks import BlockProgress, progress

from tests.callbacks.runs import record, trainer

ROOT = Path(__file__).parents[2]
# The longest numbers that a run has: what fits with these fits always.
SCRIPT = """
import sys, time
from types import SimpleNamespace
import torch
from ptql.callbacks import BlockProgress
from tests.callbacks.runs import record, trainer

bars, task = BlockProgress(refresh_per_second=20.0), SimpleNamespace(skipped_steps=120)
run = trainer(max_epochs=100, num_training_batches=1000, callback_metrics={"loss/total": torch.tensor(1.234e-5)})
bars.on_model_start(run, None)
for run.block in range(57):
    bars.on_block_end(run, record(run.block, resumed=True))
for run.block in (57, 58):
    bars.on_block_start(run, task)
    run.current_epoch = 0
    bars.on_train_start(run, task)
    run.current_epoch = 99
    bars.on_train_batch_end(run, task, None, None, 900)
    time.sleep(0.2)
    print("said by another part")
    values = {"loss": 1.234e-5, "loss_start": 5.678e-5, "fell_back": True, "skipped_steps": 120}
    bars.on_block_end(run, record(run.block, **values))
if "exception" in sys.argv:
    bars.on_exception(run, task, KeyboardInterrupt())
raise SystemExit(3)
"""


@pytest.fixture
def clock(monkeypatch):
    """The time, which stands still if nobody moves it."""
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.time))
    return now


@pytest.fixture
def task():
    return SimpleNamespace(skipped_steps=0)


def learn(bars, run, task, clock, seconds=10.0, steps=640):
    """One block of 20 epochs."""
    bars.on_block_start(run, task)
    run.current_epoch = 0
    bars.on_train_start(run, task)
    for step in range(steps):
        run.current_epoch, index = divmod(step, run.num_training_batches)
        clock.time += seconds / steps
        bars.on_train_batch_end(run, task, None, None, index)
    bars.on_train_end(run, task)


def test_a_line_a_block_without_a_terminal(capsys, clock, task):
    bars, run = BlockProgress(), trainer(num_blocks=3)
    bars.on_model_start(run, None)
    for run.block, values in enumerate(({"loss_start": 0.2, "loss": 0.1}, {"fell_back": True}, {"skipped_steps": 2})):
        learn(bars, run, task, clock)
        bars.on_block_end(run, record(run.block, **{"loss_start": 0.25, "loss": 0.25, **values}))
    bars.on_model_end(run, None)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "block 1/3  loss 0.2000 -> 0.1000  10 s  20 s left",
        "block 2/3  loss 0.2500  10 s  start kept  10 s left",
        "block 3/3  loss 0.2500  10 s  2 skipped",
    ]


def test_long_blocks_say_a_line_now_and_then(capsys, clock, task):
    bars, run = BlockProgress(line_every_seconds=60.0), trainer(num_blocks=2)
    bars.on_model_start(run, None)
    task.skipped_steps = 3
    learn(bars, run, task, clock, seconds=190.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "block 1/2  epoch 7/20  loss 0.0123  3 skipped  5 min 20 s left"


def test_blocks_that_were_finished_earlier_are_said_once(capsys, clock, task):
    bars, run = BlockProgress(), trainer(num_blocks=80)
    bars.on_model_start(run, None)
    for run.block in range(80):
        if run.block in (57, 60):
            learn(bars, run, task, clock)
        bars.on_block_end(
            run, record(run.block, resumed=run.block not in (57, 60), fell_back=False, loss=0.1, loss_start=0.1)
        )
    assert capsys.readouterr().err.splitlines() == [
        "blocks 1-57 of 80: finished earlier",
        "block 58/80  loss 0.1000  10 s  3 min 40 s left",
        "blocks 59-60 of 80: finished earlier",
        "block 61/80  loss 0.1000  10 s  3 min 10 s left",
        "blocks 62-80 of 80: finished earlier",
    ]


def test_passing_through_finished_blocks_for_long_is_said_in_between(capsys, clock):
    bars, run = BlockProgress(line_every_seconds=60.0), trainer(num_blocks=10)
    bars.on_model_start(run, None)
    for run.block in range(10):
        clock.time += 20
        bars.on_block_end(run, record(run.block, resumed=True))
    assert [line[:10] for line in capsys.readouterr().err.splitlines()] == [
        "blocks 1-3",
        "blocks 4-6",
        "blocks 7-9",
        "block 10 o",
    ]


def test_the_loss_is_not_read_at_every_step(clock, task):
    reads = []

    class Metrics(dict):
        def get(self, name):
            reads.append(clock.time)
            return torch.tensor(1.0)

    for bars_shown in (False, True):
        bars, run = BlockProgress(), trainer(callback_metrics=Metrics())
        bars.on_model_start(run, None)
        bars._bars = SimpleNamespace(steps=lambda *a: None, notes=lambda *a, **k: None) if bars_shown else None
        reads.clear()
        learn(bars, run, task, clock, seconds=30.0, steps=600)
        assert len(reads) <= (31 if bars_shown else 0)
        assert not bars_shown or len(reads) >= 25


def test_a_block_that_goes_on_does_not_begin_at_nought(capsys, clock, task):
    bars, run = BlockProgress(line_every_seconds=0.0), trainer(num_blocks=2, current_epoch=10)
    bars.on_model_start(run, None)
    bars.on_train_start(run, task)
    clock.time += 16.0
    bars.on_train_batch_end(run, task, None, None, 31)
    assert capsys.readouterr().err == "block 1/2  epoch 11/20  loss 0.0123  7 min 44 s left\n"


def test_other_processes_say_nothing(capsys, clock, task):
    bars, run = BlockProgress(line_every_seconds=0.0), trainer(is_global_zero=False, num_blocks=1)
    bars.on_model_start(run, None)
    learn(bars, run, task, clock)
    bars.on_block_end(run, record(0))
    bars.on_model_end(run, None)
    assert capsys.readouterr().err == ""


def on_terminal(*arguments: str, **environment: str) -> str:
    """All that the script writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
    for name in ("COLUMNS", "LINES", "FORCE_COLOR"):
        env.pop(name, None)
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=env
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert child.wait(timeout=60) == 3
    return written.decode()


CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def left_alone() -> str:
    """The script ends without a word to the bars."""
    return on_terminal()


@pytest.mark.parametrize("stopped", [False, True], ids=["exit", "exception"])
def test_everything_fits_80_columns_and_the_cursor_comes_back(left_alone, stopped):
    written = on_terminal("exception") if stopped else left_alone
    lines = [CONTROLS.sub("", line).rstrip() for line in re.split("[\r\n]+", written)]
    assert max(map(len, lines)) <= 80
    bars = [line for line in lines if "━" in line]
    assert bars
    assert max(map(len, bars)) <= 77  # room for an echoed ^C
    assert not [line for line in lines if "…" in line]
    assert any(line.endswith("epoch 100/100  loss 1.23e-5  120 skipped") for line in bars)
    assert "blocks 1-57 of 80: finished earlier" in lines
    assert any(re.fullmatch(r"block 58/80  loss 5.678e-5 -> 1.234e-5  .*  start kept  120 skipped", x) for x in lines)
    assert "said by another part" in lines
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert CONTROLS.sub("", written).endswith("\n")


def test_colours_are_left_out_where_they_are_not_wanted(left_alone):
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    assert colour.search(left_alone)
    assert not colour.search(on_terminal(NO_COLOR="1"))


def test_a_simple_terminal_gets_plain_lines():
    written = on_terminal(TERM="dumb")
    assert "\x1b" not in written
    assert "blocks 1-57 of 80: finished earlier" in written

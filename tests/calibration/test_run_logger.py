"""TensorBoard after a run was stopped inside a block and went on: each step once, as its page shows it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ptql.calibration.block_task import BlockTask
from ptql.cli import main
from tests.words import save_source, save_text

STEPS = 2 * 3 * 2  # blocks, epochs, batches

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def args() -> list[str]:
    places = ("--model.source", str(save_source(Path("source").absolute())), "--trainer.default_root_dir", "RUN")
    small = ("--data.text", str(save_text(Path("words.txt"))), "--data.length", "16", "--data.samples", "3")
    learn = ("--data.batch_size", "2", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1")
    recipe = ("-c", "methods/lrquant", "-c", "schemes/w4a4", "--trainer.accelerator", "cpu")
    return ["fit", *recipe, *places, *small, *learn]


class Dead(BaseException):
    """Ends a run as a kill does, without a save; what was logged so far is on disk."""


def broken_off(monkeypatch: pytest.MonkeyPatch, args: list[str], at: int, by: signal.Signals | None) -> None:
    """A run that a signal, or a kill (None), ends in its step `at`."""
    steps, step = [], BlockTask.training_step

    def signalled(self: BlockTask, batch: Any, batch_idx: int) -> Any:
        if len(steps) == at:
            if by is None:
                raise Dead
            os.kill(os.getpid(), by)
        steps.append(batch_idx)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(BlockTask, "training_step", signalled)
        if by is None:
            with pytest.raises(Dead):
                main(args)
        else:
            assert main(args) == 128 + by
    time.sleep(1.1)  # files are read by their names: the second, then the process, which is the same one here


def shown() -> dict[str, list[int]]:
    """Steps of every curve, the whole directory read as TensorBoard's server reads it."""
    board = EventAccumulator("RUN/tensorboard", size_guidance={"scalars": 0}).Reload()
    return {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def assert_each_step_once() -> None:
    found = shown()
    assert {"loss/total", "block/loss"} <= found.keys()
    for tag, steps in found.items():
        by_block = tag.startswith(("block/", "weight_error/"))
        assert steps == list(range(2 if by_block else STEPS)), tag


def test_a_run_that_was_never_stopped(args: list[str]) -> None:
    assert main(args) == 0
    assert_each_step_once()


@pytest.mark.parametrize("at", [0, 3, 8, 11])
def test_stopped_by_a_signal(monkeypatch: pytest.MonkeyPatch, args: list[str], at: int) -> None:
    broken_off(monkeypatch, args, at, signal.SIGTERM)
    assert main(args) == 0
    assert_each_step_once()


def test_stopped_twice(monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    broken_off(monkeypatch, args, 2, signal.SIGTERM)
    broken_off(monkeypatch, args, 6, signal.SIGINT)
    assert main(args) == 0
    assert_each_step_once()


@pytest.mark.parametrize("at", [3, 5, 9, 11])
def test_killed_after_a_save(monkeypatch: pytest.MonkeyPatch, args: list[str], at: int) -> None:
    """Saved at the end of each epoch; the steps since then are done, and logged, again."""
    Path("saving.yaml").write_text(
        "trainer: {callbacks: [{class_path: ptql.callbacks.BlockCheckpoint, init_args: {every_seconds: 0}}]}"
    )
    args = [*args, "-c", "saving.yaml"]
    broken_off(monkeypatch, args, at, None)
    assert main(args) == 0
    assert_each_step_once()


@pytest.mark.parametrize("at", [1, 9])
def test_killed_before_a_save(monkeypatch: pytest.MonkeyPatch, args: list[str], at: int) -> None:
    """The block begins anew."""
    broken_off(monkeypatch, args, at, None)
    assert main(args) == 0
    assert_each_step_once()


def test_one_file_for_each_process(args: list[str]) -> None:
    """Several of one second would be read in the order of their names, the tenth before the ninth."""
    assert main(args) == 0
    assert len(list(Path("RUN/tensorboard").glob("events.out.tfevents.*"))) == 1

"""Both models' hidden states on the way to the blocks that learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptql.checkpoint import Checkpoint
from ptql.evaluation import perplexity as measuring
from ptql.evaluation.recorded_run import RecordedRun
from ptql.evaluation.standing import STREAMS, Standing
from ptql.evaluation.text_under_test import TextUnderTest
from ptql.nn.student import run_block
from tests.callbacks.adapted import fitted
from tests.models import llama_config, some_ids

CPU, BLOCKS = torch.device("cpu"), 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    folder = tmp_path_factory.mktemp("deep")
    settings = {"trainer.max_epochs": 1}
    return RecordedRun.open(fitted(folder, llama_config(num_hidden_layers=BLOCKS), settings=settings))


def under_test(run: RecordedRun, windows: Tensor) -> TextUnderTest:
    return TextUnderTest("mine", windows, torch.zeros(len(windows), dtype=torch.float64), run, CPU, 2)


def passed(model: Checkpoint, windows: Tensor, blocks: int) -> Tensor:
    """What so many blocks of a model make of its embeddings."""
    hidden, contexts = model.shell().embed(windows)
    for index in range(blocks):
        hidden = run_block(model.block(index), hidden, contexts[index], len(windows))
    return hidden


@pytest.mark.parametrize("order", [(1, 2, 4), (4, 2, 1), (2, 2)])
def test_each_model_goes_its_own_way(run: RecordedRun, order: tuple[int, ...]) -> None:
    """Whatever was asked for before; and what was given earlier stays as it was."""
    windows, given = some_ids(5, 16), []
    text = under_test(run, windows)
    for blocks in order:
        given.append((blocks, text.before_last(blocks)))
    for blocks, standing in given:
        index = BLOCKS - blocks
        assert standing.block == index
        assert len(standing.contexts) == BLOCKS
        torch.testing.assert_close(standing.fp, passed(run.source, windows, index), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(standing.quantised, passed(run.packed, windows, index), rtol=1e-4, atol=1e-5)
        assert torch.equal(standing.fp, standing.quantised) == (index == 0)


def test_the_way_is_gone_once(run: RecordedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[Path, int]] = []
    block = Checkpoint.block
    monkeypatch.setattr(
        Checkpoint,
        "block",
        lambda self, index, *more: read.append((self.directory, index)) or block(self, index, *more),
    )
    text = under_test(run, some_ids(2, 16))
    for blocks in (2, 1, 1):
        text.before_last(blocks)
    assert sorted(read) == sorted(
        (model.directory, index) for model in (run.source, run.packed) for index in range(BLOCKS - 1)
    )


def test_room_is_asked_for_all_that_learning_holds(run: RecordedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def place(stream_bytes: int, device: torch.device, streams: int) -> torch.device:
        asked.append((stream_bytes, streams))
        return device

    monkeypatch.setattr(measuring, "resting_place", place)
    Standing.at_start(run.source.shell(), some_ids(3, 16), CPU, 2)
    assert asked == [(3 * 16 * 48 * 4, STREAMS)]

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from ptql.calibration.data import CalibrationData
from ptql.calibration.memory_budget import Budget
from ptql.calibration.tokens import load_tokenizer, sample_windows, tokenize
from ptql.errors import InputError

TEXT = "Once upon a time, there was a little girl.\n" * 40


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "story.txt").write_text(TEXT)
    return tmp_path / "story.txt"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"samples": 0}, r"samples=0: .*--data\.samples"),
        ({"length": 1}, r"length=1: .*--data\.length"),
        ({"batch_size": 0}, r"batch_size=0: .*1 to 128.*--data\.batch_size 4"),
        ({"samples": 3, "batch_size": 4}, r"batch_size=4: .*1 to 3.*--data\.batch_size 3"),
        ({"memory": "8"}, r"^memory=8: a number above 0 and its unit.*--data\.memory 8GiB"),
        ({"host_memory": "8 GiB"}, r"^host_memory=8 GiB: .*--data\.host_memory 8GiB"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationData(**numbers)


def test_a_last_batch_may_be_shorter() -> None:
    assert CalibrationData(samples=5, batch_size=4).batch_size == 4


@pytest.mark.shared
def test_windows_are_drawn_from_the_text(story: Path, stories_dir: Path) -> None:
    data = CalibrationData(str(story), samples=6, length=32, seed=7)
    windows = data.windows(stories_dir, context=32)
    assert torch.equal(windows, sample_windows(tokenize(load_tokenizer(stories_dir), TEXT), 6, 32, 7))
    assert torch.equal(data.windows(str(stories_dir), context=None), windows)


@pytest.mark.shared
def test_the_default_text_suits_a_small_model(story: Path, stories_dir: Path) -> None:
    assert CalibrationData(samples=8, length=512).windows(stories_dir, 512).shape == (8, 512)


def test_a_window_longer_than_the_context_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    data = CalibrationData(str(tmp_path / "none.txt"), length=513)
    with pytest.raises(InputError, match=r"length=513: .*context of 512 tokens; use --data\.length 512"):
        data.windows(tmp_path / "none", context=512)


def test_identity_has_what_decides_the_batches(story: Path) -> None:
    base = {"text": str(story), "samples": 6, "length": 32, "batch_size": 2, "seed": 7}
    first = CalibrationData(**base).identity()
    for change in ({"samples": 7}, {"length": 33}, {"batch_size": 3}, {"seed": 8}, {"rows": "wikitext"}):
        assert CalibrationData(**{**base, **change}).identity() != first, change
    moved = story.rename(story.with_name("moved.txt"))
    assert CalibrationData(**{**base, "text": str(moved)}).identity() == first
    moved.write_text(TEXT + "!")
    assert CalibrationData(**{**base, "text": str(moved)}).identity() != first


def test_memory_belongs_to_the_settings_and_not_to_the_identity(story: Path) -> None:
    base = CalibrationData(str(story), samples=6, length=32)
    assert base.budget() == Budget(None, None, 1)
    for change in ({"memory": "8GiB"}, {"host_memory": "500MB"}):
        changed = CalibrationData(str(story), samples=6, length=32, **change)
        assert changed.settings() != base.settings()
        assert changed.identity() == base.identity()
    both = CalibrationData(str(story), memory="8GiB", host_memory="500MB")
    assert both.budget(3) == Budget(8 * 2**30, 500 * 10**6, 3)


def test_the_command_line_gets_its_help_from_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CalibrationData, "data")
    parsed = parser.parse_args(["--data.text", "c4", "--data.rows", "plain", "--data.memory", "8"])
    assert (parsed.data.text, parsed.data.rows, parsed.data.samples) == ("c4", "plain", 128)
    assert (parsed.data.memory, parsed.data.host_memory) == ("8", None)  # refused with a line of ours
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "Windows in a batch" in capsys.readouterr().out

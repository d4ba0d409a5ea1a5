"""The checkpoint of the block in hand survives a kill between any two steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ptql.calibration import partial
from ptql.calibration.partial import Partial
from ptql.errors import InputError


class Killed(BaseException):
    """Stands for a kill: nothing of the process goes on."""


@pytest.fixture
def kept(tmp_path: Path) -> Partial:
    """Block 3 is saved, in its first version."""
    made = Partial(tmp_path)
    save(made, "first")
    return made


def save(made: Partial, content: Any, block: int = 3) -> None:
    torch.save({"said": content}, made.scratch)
    made.keep(block)


def found(folder: Path, block: int = 3) -> str | None:
    """What another process finds; nothing may be called damaged."""
    path = Partial(folder).find(block, lambda path: pytest.fail(f"{path} is called damaged"))
    return None if path is None else torch.load(path, weights_only=True)["said"]


def test_the_last_one_counts_and_is_alone(kept: Partial, tmp_path: Path) -> None:
    assert found(tmp_path) == "first"
    save(kept, "second")
    assert found(tmp_path) == "second"
    assert len(os.listdir(tmp_path)) == 1
    save(kept, "second")  # the same content has the same name
    assert found(tmp_path) == "second"
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "nth", "expected"),
    [("fsync", 1, "first"), ("replace", 1, "first"), ("replace", 2, "second")],
)
def test_killed_between_the_steps_of_saving(
    kept: Partial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int, expected: str
) -> None:
    """Before fsync, before the rename, and after the rename but before the older one is removed."""

    def killed(*args: Any) -> None:
        if nth == 2:
            real(*args)
        raise Killed

    real = getattr(os, name)
    with monkeypatch.context() as patched:
        patched.setattr(partial.os, name, killed)
        with pytest.raises(Killed):
            save(kept, "second")
    assert found(tmp_path) in (("first", "second") if nth == 2 else (expected,))  # either is whole, and of this block
    save(Partial(tmp_path), "third")
    assert found(tmp_path) == "third"
    assert len(os.listdir(tmp_path)) == 1


def test_a_half_written_scratch_file_is_not_taken(kept: Partial, tmp_path: Path) -> None:
    kept.scratch.write_bytes(b"hal")
    assert found(tmp_path) == "first"
    kept.clear()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "emptied", "one bit", "longer"])
def test_a_damaged_one_is_told_and_not_taken(kept: Partial, tmp_path: Path, damage: str) -> None:
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    bit = bytes([*content[:100], content[100] ^ 1, *content[101:]])
    path.write_bytes({"cut": content[:-1], "emptied": b"", "one bit": bit, "longer": content + b" "}[damage])
    damaged: list[Path] = []
    assert Partial(tmp_path).find(3, damaged.append) is None
    assert damaged == [path]


def test_what_can_not_be_read_back_is_not_kept(kept: Partial, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't be read back .*tensors, numbers and text only"):
        save(kept, Path("of a class that would have to be unpickled"))
    assert found(tmp_path) == "first"
    assert len(os.listdir(tmp_path)) == 1


def test_one_of_another_block_is_neither_taken_nor_called_damaged(kept: Partial, tmp_path: Path) -> None:
    for block in (0, 2, 4, 30, 33):
        assert found(tmp_path, block) is None
    save(kept, "of the next", block=4)
    assert found(tmp_path, 3) is None
    assert found(tmp_path, 4) == "of the next"


def test_clearing_leaves_other_files(kept: Partial, tmp_path: Path) -> None:
    (tmp_path / "block-00000.safetensors").touch()
    (tmp_path / "manifest.json").touch()
    kept.clear()
    kept.clear()
    assert sorted(os.listdir(tmp_path)) == ["block-00000.safetensors", "manifest.json"]

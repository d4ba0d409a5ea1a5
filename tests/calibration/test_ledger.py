"""Finished blocks on disk: whole or not there, and never another run's."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ptql.calibration.ledger import FOLDER, MANIFEST, PARTS, VERSION, BlockRecord, Ledger
from ptql.errors import InputError

IDENTITY: dict[str, Any] = {
    "source": "abc",
    "data": {"text": "xyz", "samples": 3},
    "recipe": {"weight": {"bits": 4, "group_size": -1}, "transforms": [{"class": "Smooth", "lr": 0.001}]},
    "max_epochs": 2,
}


def block(seed: int, **summary: Any) -> BlockRecord:
    """Stored tensors of all kinds, and learnables and ranges of the same name as one of them."""
    draw = torch.Generator().manual_seed(seed)
    stored = {
        "mlp.up_proj.codes": torch.randint(0, 256, (4, 3), generator=draw).to(torch.uint8),
        "mlp.up_proj.scale": torch.randint(-99, 99, (4, 1), generator=draw).to(torch.int16),
        "norm.weight": torch.randn(6, generator=draw),
        "mlp.up_proj.bias": torch.randn(4, generator=draw).half(),
        "dense": torch.randn(5, 4, generator=draw).bfloat16().T,  # not contiguous
    }
    learned = {"norm.weight": torch.randn(6, generator=draw), "empty": torch.zeros(0)}
    return BlockRecord(stored, learned, {"norm.weight": torch.rand(6, generator=draw)}, summary)


def begun(run: Path, identity: dict[str, Any] | None = None) -> Ledger:
    ledger = Ledger(run, IDENTITY if identity is None else identity)
    ledger.start()
    return ledger


def with_blocks(run: Path, count: int = 3) -> Ledger:
    ledger = begun(run)
    for index in range(count):
        ledger.record(index, block(index, loss=index / 7))
    return ledger


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def test_what_is_recorded_is_read_bit_for_bit(tmp_path: Path) -> None:
    ledger = with_blocks(tmp_path / "run")
    for again in (ledger, Ledger(tmp_path / "run", IDENTITY)):
        for index in range(3):
            found = again.read(index)
            assert found is not None
            assert same(found.stored, block(index).stored)
            assert same(found.learned, block(index).learned)
            assert same(found.ranges, block(index).ranges)
            assert found.resumed
            assert found.summary["loss"] == index / 7
            summary = again.summary(index)
            assert summary is not None
            assert summary["loss"] == index / 7
        assert again.read(3) is None
        assert again.summary(3) is None


def test_the_files_are_plain_and_complete(tmp_path: Path) -> None:
    ledger = with_blocks(tmp_path / "run")
    files = sorted(path.name for path in (tmp_path / "run" / FOLDER).iterdir())
    assert files == [*(f"block-{k:05d}.safetensors" for k in range(3)), MANIFEST]
    manifest = json.loads((tmp_path / "run" / FOLDER / MANIFEST).read_text())
    assert manifest["version"] == VERSION
    assert manifest["identity"] == IDENTITY
    for index in range(3):
        noted = manifest["blocks"][str(index)]
        content = (tmp_path / "run" / FOLDER / noted["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == noted["sha256"]
    with safe_open(tmp_path / "run" / FOLDER / "block-00001.safetensors", "pt") as tensors:
        assert "learned.norm.weight" in tensors.keys()  # noqa: SIM118
        assert "stored.norm.weight" in tensors.keys()  # noqa: SIM118
    assert ledger.manifest == manifest


def test_nothing_is_written_before_the_start(tmp_path: Path) -> None:
    Ledger(tmp_path / "run", IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_starting_again_keeps_the_blocks(tmp_path: Path) -> None:
    checksum = with_blocks(tmp_path / "run").checksum()
    again = begun(tmp_path / "run")
    assert again.checksum() == checksum
    assert Ledger(tmp_path / "run", IDENTITY).read(2) is not None


# The checksum


def test_the_checksum_is_that_of_all_blocks_in_their_order(tmp_path: Path) -> None:
    forth = with_blocks(tmp_path / "forth", 12)
    back = begun(tmp_path / "back", {"max_epochs": 7})
    for index in reversed(range(12)):
        back.record(index, block(index, loss=99.0))
    assert forth.checksum() == back.checksum()  # of the result, not of how it was reached
    swapped = begun(tmp_path / "swapped")
    for index in range(12):
        swapped.record(index, block({0: 1, 1: 0}.get(index, index)))
    assert swapped.checksum() != forth.checksum()
    shorter = with_blocks(tmp_path / "shorter", 11)
    assert shorter.checksum() != forth.checksum()


@pytest.mark.parametrize("part", PARTS)
def test_every_bit_counts(tmp_path: Path, part: str) -> None:
    one, two = with_blocks(tmp_path / "one", 1), begun(tmp_path / "two")
    changed = block(0)
    getattr(changed, part)["norm.weight"][3] += 1e-6
    two.record(0, changed)
    assert one.checksum() != two.checksum()


# Damage


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "other"])
def test_a_damaged_block_counts_as_not_finished(tmp_path: Path, damage: str) -> None:
    ledger = with_blocks(tmp_path / "run")
    checksum = ledger.checksum()
    path = tmp_path / "run" / FOLDER / "block-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    if damage == "flipped":
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.with_name("block-00002.safetensors").read_bytes())
    again = begun(tmp_path / "run")
    assert again.read(1) is None
    assert again.read(0) is not None
    assert again.read(2) is not None
    told: list[Path] = []
    assert again.finished(told.append) == {0, 2}
    assert told == [path]
    again.record(1, block(1))
    assert again.checksum() == checksum
    assert again.read(1) is not None


def test_a_kill_while_a_block_is_written_leaves_the_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = with_blocks(tmp_path / "run", 1)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for last in ("block-00001.safetensors.tmp", MANIFEST + ".tmp"):
        monkeypatch.setattr(
            "ptql.disk.os.replace",
            lambda old, new, last=last: killed() if Path(old).name == last else os.rename(old, new),
        )
        with pytest.raises(KeyboardInterrupt):
            ledger.record(1, block(1))
        again = Ledger(tmp_path / "run", IDENTITY)
        assert again.read(0) is not None
        assert again.read(1) is None
    monkeypatch.undo()
    again = begun(tmp_path / "run")
    again.record(1, block(1))
    assert not list((tmp_path / "run" / FOLDER).glob("*.tmp"))


@pytest.mark.parametrize("leftover", [None, MANIFEST + ".tmp"])
def test_a_kill_before_the_first_manifest_is_in_place(tmp_path: Path, leftover: str | None) -> None:
    folder = tmp_path / "run" / FOLDER
    folder.mkdir(parents=True)
    if leftover:
        (folder / leftover).write_text('{"vers')
    assert begun(tmp_path / "run").read(0) is None


@pytest.mark.parametrize("content", ["", '{"version": 1, "ident', "[]x", "3"])
def test_a_damaged_manifest(tmp_path: Path, content: str) -> None:
    with_blocks(tmp_path / "run")
    (tmp_path / "run" / FOLDER / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=rf"manifest\.json: damaged .*; remove {tmp_path / 'run'} and start anew"):
        Ledger(tmp_path / "run", IDENTITY)


# Another run


def changed(path: str, value: Any) -> dict[str, Any]:
    identity = json.loads(json.dumps(IDENTITY))
    *folders, last = path.split(".")
    place = identity
    for folder in folders:
        place = place[folder]
    place[last] = value
    return identity


@pytest.mark.parametrize(
    ("path", "value", "was"),
    [
        ("source", "abd", "'abc'"),
        ("data.text", "other", "'xyz'"),
        ("data.samples", 4, "3"),
        ("recipe.weight.bits", 3, "4"),
        ("recipe.weight.group_size", 64, "-1"),
        ("recipe.weight.new", 1, "None"),
        ("max_epochs", 3, "2"),
        ("also", "this", "None"),
    ],
)
def test_another_run_is_refused_and_left_alone(tmp_path: Path, path: str, value: Any, was: str) -> None:
    with_blocks(tmp_path / "run")
    manifest = (tmp_path / "run" / FOLDER / MANIFEST).read_bytes()
    with pytest.raises(InputError) as refused:
        Ledger(tmp_path / "run", changed(path, value))
    line = str(refused.value)
    assert line.startswith(f"{tmp_path / 'run'}: holds another run, whose {path} was {was} and is {value!r} now; ")
    assert line.endswith("give another --trainer.default_root_dir, or remove it")
    assert (tmp_path / "run" / FOLDER / MANIFEST).read_bytes() == manifest


def test_a_list_that_differs_is_shown_whole(tmp_path: Path) -> None:
    with_blocks(tmp_path / "run", 1)
    with pytest.raises(InputError, match=r"recipe\.transforms was \[\{'class': 'Smooth', 'lr': 0\.001\}\] and is \[\]"):
        Ledger(tmp_path / "run", changed("recipe.transforms", []))


def test_what_json_can_not_tell_apart_is_the_same_run(tmp_path: Path) -> None:
    begun(tmp_path / "run", {"betas": (0.9, 0.95), 1: "one"})
    Ledger(tmp_path / "run", {"betas": [0.9, 0.95], "1": "one"})


def test_another_version_of_the_ledger(tmp_path: Path) -> None:
    with_blocks(tmp_path / "run", 1)
    path = tmp_path / "run" / FOLDER / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(InputError, match=f"ledger version 99, this ptql writes {VERSION}; start anew"):
        Ledger(tmp_path / "run", IDENTITY)


@pytest.mark.parametrize("name", ["model", "config.yaml", "metrics.json", "tensorboard"])
def test_a_directory_of_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"holds {name} but no ledger of this run; give another"):
        Ledger(tmp_path, IDENTITY)


def test_a_directory_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match=r"run: can't be written to \(Not a directory\); give another"):
        begun(tmp_path / "run")

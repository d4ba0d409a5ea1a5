"""Files are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ptql import disk
from ptql.disk import put, put_text, save_tensors, sha256, told_if_full
from ptql.errors import InputError


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_put_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for text in ("first", "ünïcode\n"):
        put_text(path, text)
        assert path.read_bytes() == text.encode("utf-8")
        assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("half", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: BaseException, half: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(scratch: Path) -> None:
        if half:
            scratch.write_text("half")
        raise failure

    with pytest.raises(type(failure)):
        put(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_rename_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"file\.tmp"):
        put_text(path, "x")
    assert os.listdir(tmp_path) == ["file"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fsync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{number}"), os.fstat(number).st_size))
        fsync(number)

    def replaced(old: Path, new: Path) -> None:
        calls.append(("replace", str(old), str(new)))
        replace(old, new)

    monkeypatch.setattr(disk.os, "fsync", synced)
    monkeypatch.setattr(disk.os, "replace", replaced)
    path = tmp_path / "file"
    put_text(path, "12345")
    assert calls == [("fsync", f"{path}.tmp", 5), ("replace", f"{path}.tmp", str(path))]


def test_mode_bits_follow_the_umask(tmp_path: Path, umask: int) -> None:
    put_text(tmp_path / "text", "x")
    put(tmp_path / "tensors", lambda scratch: save_tensors({"a": torch.ones(2)}, scratch))
    assert mode(tmp_path / "text") == mode(tmp_path / "tensors") == 0o666 & ~umask
    assert os.umask(umask) == umask  # asking for it has not changed it


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.ones(1, dtype=torch.float16)}
    save_tensors(tensors, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_system_s_reason_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="none") as found:
        save_tensors({"a": torch.ones(1)}, tmp_path / "none/x")
    assert found.value.errno == errno.ENOENT

    def broken(*_: Any, **__: Any) -> None:
        raise SafetensorError("something else")

    monkeypatch.setattr(disk, "save_file", broken)
    with pytest.raises(SafetensorError, match="something else"):
        save_tensors({}, tmp_path / "x")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 10**6)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 10**6).hexdigest()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_a_remedy(tmp_path: Path, number: int) -> None:
    told = r"run: the disk is full .*what was finished is whole: make room"
    with pytest.raises(InputError, match=told), told_if_full(Path("run")):
        raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError), told_if_full(Path("run")):
        raise PermissionError(errno.EACCES, "no")

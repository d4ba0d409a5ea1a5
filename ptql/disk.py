"""Files that are there whole or not at all: written under another name, put on the disk, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ptql.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a scratch file beside `path`, then rename it into place.

    Raises:
        OSError: It can't be written; `path` is as it was, and the scratch file is gone.
    """
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        write(scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the content does
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out` that becomes it at the end; an older one is replaced. On errors it is gone."""
    scratch = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(scratch, out)
    shutil.rmtree(old, ignore_errors=True)


def put_text(path: Path, text: str) -> None:
    """A text file in UTF-8, whole or not at all."""
    put(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file; `OSError` where it can't be written, with the system's error number."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    os.chmod(path, 0o666 & ~_umask())  # safetensors makes files for their owner alone


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def told_if_full(run: Path) -> Iterator[None]:
    """Turn the system's word that a disk is full into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"{run}: the disk is full or a limit is reached ({error.strerror}); what was finished is whole: "
            "make room, then the same command goes on"
        ) from error

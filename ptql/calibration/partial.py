"""The checkpoint of the block in hand: Lightning's, under a name that carries block and checksum."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from ptql.disk import sha256
from ptql.errors import InputError

PATTERN = "partial-*.ckpt"


class LocalCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint where it shall be; Lightning's own goes through the system's folder of temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


class Partial:
    """At most one file `partial-BLOCK-CHECKSUM.ckpt` in the ledger's folder.

    One name for place, content and checksum: no kill comes between a file and the note about it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / "partial.ckpt.tmp"

    def keep(self, block: int) -> None:
        """Make the scratch file the checkpoint of this block, in place of any other.

        Raises:
            InputError: It holds what would have to be unpickled, so nothing could go on from it.
        """
        if reason := _unreadable(self.scratch):
            self.scratch.unlink()
            raise InputError(
                f"callbacks: the state of one can't be read back ({reason}); let its state_dict hold tensors, numbers "
                "and text only"
            )
        with open(self.scratch, "rb") as file:
            os.fsync(file.fileno())
        path = self.folder / f"partial-{block:05d}-{sha256(self.scratch)[:16]}.ckpt"
        os.replace(self.scratch, path)
        self._remove_all_but(path)

    def find(self, block: int, damaged: Callable[[Path], None]) -> Path | None:
        """The checkpoint of this block; one whose content is not what its name says is given to `damaged`."""
        for path in sorted(self.folder.glob(f"partial-{block:05d}-*.ckpt")):
            if path.stem.endswith(sha256(path)[:16]) and not _unreadable(path):
                return path
            damaged(path)
        return None

    def clear(self) -> None:
        """Remove what is no longer of use."""
        self.scratch.unlink(missing_ok=True)
        self._remove_all_but(None)

    def _remove_all_but(self, kept: Path | None) -> None:
        for path in self.folder.glob(PATTERN):
            if path != kept:
                path.unlink(missing_ok=True)


def _unreadable(path: Path) -> str | None:
    """Why a checkpoint can't be loaded without unpickling; None if it can."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        return str(error).strip().partition("\n")[0]
    return None

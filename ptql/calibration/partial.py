"""The checkpoint of the block in hand: Lightning's, under a name that carries block and checksum."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ptql.disk import sha256

PATTERN = "partial-*.ckpt"


class Partial:
    """At most one file `partial-BLOCK-CHECKSUM.ckpt` in the ledger's folder.

    One name for place, content and checksum: no kill comes between a file and the note about it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / "partial.ckpt.tmp"

    def keep(self, block: int) -> None:
        """Make the scratch file the checkpoint of this block, in place of any other."""
        with open(self.scratch, "rb") as file:
            os.fsync(file.fileno())
        path = self.folder / f"partial-{block:05d}-{sha256(self.scratch)[:16]}.ckpt"
        os.replace(self.scratch, path)
        self._remove_all_but(path)

    def find(self, block: int, damaged: Callable[[Path], None]) -> Path | None:
        """The checkpoint of this block; one whose content is not what its name says is given to `damaged`."""
        for path in sorted(self.folder.glob(f"partial-{block:05d}-*.ckpt")):
            if path.stem.endswith(sha256(path)[:16]):
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

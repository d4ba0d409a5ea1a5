"""Finished blocks on disk: one safetensors file a block, and a manifest that says what run they belong to."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ptql.calibration.ranks import Ranks
from ptql.disk import put, put_text, save_tensors, sha256
from ptql.errors import InputError

FOLDER = "ledger"
MANIFEST = "manifest.json"
VERSION = 1
OURS = ("ledger", "model", "config.yaml", "metrics.json", "report.html", "tensorboard")
PARTS = ("stored", "learned", "ranges")


@dataclass
class BlockRecord:
    """A finished block.

    Args:
        stored: What is stored of it, packed, by name in the block.
        learned: Learnables by name.
        ranges: Largest |input| of each channel, [in], `before.LINEAR` in the full-precision block and
            `after.LINEAR` in the quantised one (smoothed, not rounded), for the first of the layers that share it;
            `mean.LINEAR`: mean |input| in the full-precision block.
        summary: Losses, errors, seconds and what happened; JSON values.
        resumed: Whether an earlier process finished it.
    """

    stored: dict[str, Tensor]
    learned: dict[str, Tensor]
    ranges: dict[str, Tensor]
    summary: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False

    def magnitudes(self, linear: str) -> tuple[Tensor, Tensor]:
        """Largest and mean |input| of each channel in the full-precision block; of layers that share it, the first."""
        absmax = self.ranges[f"before.{linear}"]
        # runs made before means were kept have no part that reads them
        return absmax, self.ranges.get(f"mean.{linear}", absmax)


class Ledger:
    """The record of a run's finished blocks.

    Args:
        run: The run's directory; the ledger is a folder in it.
        identity: What decides the result: source, data, recipe. A ledger of another identity is refused.

    Raises:
        InputError: The directory holds another run, or files that are not a run's.
    """

    def __init__(self, run: Path, identity: dict[str, Any]) -> None:
        self.run, self.folder = run, run / FOLDER
        self.seconds = 0.0
        """Spent on writing blocks by this process."""
        self.manifest: dict[str, Any] = {
            "version": VERSION,
            "identity": json.loads(json.dumps(identity)),
            "blocks": {},
        }
        path = self.folder / MANIFEST
        if path.is_file():
            self._continue(read_manifest(path))
        elif taken := [name for name in OURS if (run / name).exists() and not self._just_begun(name)]:
            raise InputError(
                f"{run}: holds {', '.join(taken)} but no ledger of this run; "
                "give another --trainer.default_root_dir, or remove it"
            )

    def _just_begun(self, name: str) -> bool:
        """Whether this is a ledger of a run that was killed before its manifest was in place."""
        return name == FOLDER and all(file.name == MANIFEST + ".tmp" for file in self.folder.iterdir())

    def _continue(self, found: dict[str, Any]) -> None:
        mine = self.manifest["identity"]
        theirs = found.get("identity", {})
        if found.get("version") != VERSION:
            raise InputError(
                f"{self.folder}: ledger version {found.get('version')}, this ptql writes {VERSION}; start anew"
            )
        if (changed := difference(theirs, mine)) is not None:
            key, before, now = changed
            raise InputError(
                f"{self.run}: holds another run, whose {key} was {before!r} and is {now!r} now; "
                "give another --trainer.default_root_dir, or remove it"
            )
        self.manifest = found

    def start(self) -> None:
        """Put the manifest on disk: from now on the directory belongs to this run; `InputError` if it can't."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest()
        except OSError as error:
            raise InputError(
                f"{self.run}: can't be written to ({error.strerror}); give another --trainer.default_root_dir"
            ) from error

    def summary(self, index: int) -> dict[str, Any] | None:
        """What was noted of block `index`, or None if it is not finished."""
        return self.manifest["blocks"].get(str(index))

    def finished(self, damaged: Callable[[Path], None]) -> set[int]:
        """The blocks whose files are what the manifest says; others it names are given to `damaged`."""
        good = set()
        for index in map(int, self.manifest["blocks"]):
            if self._is_whole(index):
                good.add(index)
            else:
                damaged(self._path(index))
        return good

    def read(self, index: int) -> BlockRecord | None:
        """A finished block; None if it isn't finished, or its file is damaged."""
        if not self._is_whole(index):
            return None
        tensors = load_file(self._path(index))
        parts = {part: _part(tensors, f"{part}.") for part in PARTS}
        return BlockRecord(**parts, summary=self.summary(index) or {}, resumed=True)

    def _is_whole(self, index: int) -> bool:
        noted, path = self.summary(index), self._path(index)
        return noted is not None and path.is_file() and sha256(path) == noted["sha256"]

    def record(self, index: int, block: BlockRecord) -> None:
        """Put a finished block on disk: its file is renamed into place before the manifest names it."""
        tensors = {
            f"{part}.{name}": tensor.detach().cpu().contiguous()
            for part in PARTS
            for name, tensor in getattr(block, part).items()
        }
        began, path = time.monotonic(), self._path(index)
        put(path, lambda scratch: save_tensors(tensors, scratch))
        self.manifest["blocks"][str(index)] = {"file": path.name, "sha256": sha256(path), **block.summary}
        self._write_manifest()
        self.seconds += time.monotonic() - began

    def checksum(self) -> str:
        """A hash of all finished blocks: equal for equal results."""
        digest = hashlib.sha256()
        for index in sorted(self.manifest["blocks"], key=int):
            digest.update(self.manifest["blocks"][index]["sha256"].encode())
        return digest.hexdigest()[:16]

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _write_manifest(self) -> None:
        put_text(self.folder / MANIFEST, json.dumps(self.manifest, indent=2) + "\n")


def shared_ledger(
    run: Path, identity: dict[str, Any], ranks: Ranks, blocks: int
) -> tuple[Ledger, set[int], list[Path]]:
    """The ledger that a process has started, as all processes see it.

    Returns:
        The ledger, the blocks whose files every process can read, and those that this one found damaged.

    Raises:
        InputError: The directory is not the same for all of them.
    """
    if not ranks.all((run / FOLDER / MANIFEST).is_file()):
        raise InputError(
            f"{run}: not the same directory for all processes; give a --trainer.default_root_dir that all see"
        )
    damaged: list[Path] = []
    ledger = Ledger(run, identity)
    here = ledger.finished(damaged.append)
    everywhere = ranks.smallest(torch.tensor([float(index in here) for index in range(blocks)]))
    return ledger, {index for index, whole in enumerate(everywhere.tolist()) if whole}, damaged


def read_manifest(path: Path) -> dict[str, Any]:
    """What a ledger's manifest says; `InputError` if it is damaged."""
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        if found.get("version") == VERSION:
            for index, block in found["blocks"].items():
                assert int(index) >= 0
                assert isinstance(block["sha256"], str)
        return found
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"{path}: damaged ({error}); remove {path.parent.parent} and start anew") from None


def difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first difference of two nested settings: where it is, and both values."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if found := difference(before.get(name), now.get(name), f"{key}.{name}" if key else name):
                return found
    return key, before, now


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

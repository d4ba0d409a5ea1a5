"""Finished blocks on disk: one safetensors file a block, and a manifest that says what run they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ptql.errors import InputError

FOLDER = "ledger"
MANIFEST = "manifest.json"
VERSION = 1
OURS = ("ledger", "model", "config.yaml", "metrics.json", "tensorboard")
STORED, LEARNED = "stored.", "learned."


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
        self.manifest: dict[str, Any] = {
            "version": VERSION,
            "identity": json.loads(json.dumps(identity)),
            "blocks": {},
        }
        path = self.folder / MANIFEST
        if path.is_file():
            self._continue(_manifest(path))
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
        if (changed := _change(theirs, mine)) is not None:
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

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Stored tensors and learnables of a finished block; None if it isn't finished, or its file is damaged."""
        noted = self.summary(index)
        path = self._path(index)
        if noted is None or not path.is_file() or _sha256(path) != noted["sha256"]:
            return None
        tensors = load_file(path)
        return _part(tensors, STORED), _part(tensors, LEARNED)

    def record(
        self, index: int, stored: dict[str, Tensor], learned: dict[str, Tensor], summary: dict[str, Any]
    ) -> None:
        """Put a finished block on disk: its file is renamed into place before the manifest names it."""
        tensors = {STORED + name: tensor for name, tensor in stored.items()}
        tensors |= {LEARNED + name: tensor for name, tensor in learned.items()}
        path = self._path(index)
        scratch = path.with_suffix(".tmp")
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch)
        os.replace(scratch, path)
        self.manifest["blocks"][str(index)] = {"file": path.name, "sha256": _sha256(path), **summary}
        self._write_manifest()

    def checksum(self) -> str:
        """A hash of all finished blocks: equal for equal results."""
        digest = hashlib.sha256()
        for index in sorted(self.manifest["blocks"], key=int):
            digest.update(self.manifest["blocks"][index]["sha256"].encode())
        return digest.hexdigest()[:16]

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _write_manifest(self) -> None:
        scratch = self.folder / (MANIFEST + ".tmp")
        scratch.write_text(json.dumps(self.manifest, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, self.folder / MANIFEST)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); remove {path.parent.parent} and start anew") from None


def _change(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first difference of two nested settings: where it is, and both values."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if found := _change(before.get(name), now.get(name), f"{key}.{name}" if key else name):
                return found
    return key, before, now


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

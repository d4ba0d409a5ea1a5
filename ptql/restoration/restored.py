"""What a restored model says of itself: where it comes from, and which channels were salient before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ptql.calibration.ledger import Ledger
from ptql.checkpoint import Checkpoint
from ptql.disk import put_text, save_tensors, sha256
from ptql.errors import InputError
from ptql.formats.write import RESTORATION
from ptql.parts.inputs import InputRange

CHANNELS = "salience.tensors"  # no *.safetensors: some programs load all of these
KINDS = ("absmax", "mean")


@dataclass(frozen=True)
class Salience:
    """Sizes of the inputs in the model before it was restored, from which salient channels are chosen once more.

    Args:
        file: Holds `BLOCK.LINEAR.absmax` and `.mean` [in], for the first of the layers that share an input.
        sha256: Of the file: another one is another recipe.
    """

    file: Path
    sha256: str

    @classmethod
    def beside(cls, source: Path) -> Salience | None:
        """That of a model directory; None if it has none."""
        file = source / CHANNELS
        return cls(file, sha256(file)) if file.is_file() else None

    def of(self, index: int, checkpoint: Checkpoint, device: torch.device) -> dict[str, InputRange]:
        """Ranges by linear layer of a block; `InputError` if the file does not fit the model."""
        try:
            found = {}
            with safe_open(self.file, "pt") as tensors:  # this block's alone
                for group in checkpoint.layout.linears:
                    names = (f"{index}.{group[0]}.{kind}" for kind in KINDS)
                    absmax, mean = (tensors.get_tensor(name).to(device) for name in names)
                    found |= dict.fromkeys(group, InputRange.of_magnitudes(absmax, mean))
        except (OSError, SafetensorError, LookupError) as error:
            raise InputError(
                f"{self.file}: does not fit the model beside it ({error!r}); restore the file, or remove it for "
                "salient channels of the restored model's own"
            ) from None
        return found


def salience_of(first: Ledger, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What `Salience` reads, from the blocks of a first pass."""
    found = {}
    for index in range(checkpoint.num_blocks):
        block = first.read(index)
        if block is None:
            raise InputError(
                f"block {index} is missing or damaged in {first.folder}; remove the folder `restored` beside that run, "
                "if there is one, and the command that made the run does the block again"
            )
        for group in checkpoint.layout.linears:
            sizes = zip(KINDS, block.magnitudes(group[0]), strict=True)
            found |= {f"{index}.{group[0]}.{kind}": size for kind, size in sizes}
    return found


def describe(facts: dict[str, Any], salience: dict[str, torch.Tensor] | None) -> Callable[[Path], None]:
    """What puts the files of this page into a model directory."""

    def write(folder: Path) -> None:
        put_text(folder / RESTORATION, json.dumps(facts, indent=2) + "\n")
        if salience is not None:
            save_tensors(salience, folder / CHANNELS)

    return write


def restoration_of(model: Path) -> dict[str, Any]:
    """How the model of a directory was restored; empty if it was not, or if that can't be read."""
    try:
        return dict(json.loads((model / RESTORATION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def restored_by(model: Path) -> dict[str, Any]:
    """The section `restoration` of metrics.json of a run whose source is the model; nothing if it was not restored."""
    facts = restoration_of(model)
    told = ("text", "steps", "tokens", "seconds", "skipped_steps", "losses")
    return {"restoration": {key: facts[key] for key in told if key in facts}} if facts else {}

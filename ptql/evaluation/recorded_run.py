"""A finished run, opened again: its recipe, its source, what its blocks learned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from ptql.calibration.ledger import FOLDER, MANIFEST, BlockRecord, Ledger, difference, read_manifest
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint, resolve
from ptql.errors import InputError
from ptql.evaluation.results import read_metrics
from ptql.parse_errors import told_as_input
from ptql.parts.inputs import InputRange

CONFIG = "config.yaml"
METRICS = "metrics.json"
MODEL = "model"


@dataclass(frozen=True)
class RecordedRun:
    """What a finished run left behind, only read from here on.

    Args:
        directory: Of the run.
        model: Its recipe.
        source: The full-precision model.
        packed: What came of it.
        ledger: Finished blocks.
    """

    directory: Path
    model: QuantLM
    source: Checkpoint
    packed: Checkpoint
    ledger: Ledger

    @classmethod
    def open(cls, directory: Path) -> RecordedRun:
        """Open a run whose recipe, source and ledger are those with which it was made.

        Raises:
            InputError: One of them is missing or was changed since.
        """
        manifest = directory / FOLDER / MANIFEST
        if not manifest.is_file():
            raise InputError(f"{manifest}: missing; what the blocks learned is read there; keep the run's ledger")
        identity = read_manifest(manifest).get("identity")
        if not isinstance(identity, dict):
            raise InputError(f"{manifest}: damaged, it does not say what the run was made from; restore the file")
        model = _recipe(directory / CONFIG)
        source = Checkpoint(resolve(source_of(directory)))
        model.take_salience(source)
        if change := difference(identity.get("recipe"), json.loads(json.dumps(model.identity()))):
            key, before, now = change
            raise InputError(
                f"{directory / CONFIG}: {key} was {before!r} in this run and is {now!r} now; restore the file, or use "
                "the ptql that made the run"
            )
        if source.fingerprint() != identity.get("source"):
            raise InputError(f"{source.directory}: not the weights that {directory} was made from; restore them")
        packed = Checkpoint(directory / MODEL)
        if model.watches or (packed.packed is not None and packed.packed.static is not None):
            raise InputError(
                f"{directory}: its blocks sort channels or have fixed grids, and how these were found is not kept, so "
                "none can learn again; measure the run without adaptation"
            )
        if packed.packed is not None:
            model.layer_schemes = packed.packed.schemes
        return cls(directory, model, source, packed, Ledger(directory, identity))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decided the run's result."""
        return self.ledger.manifest["identity"]

    def record(self, index: int) -> BlockRecord:
        """A block as it was finished; `InputError` if its file is damaged."""
        found = self.ledger.read(index)
        if found is None:
            raise InputError(f"{self.ledger.folder}: block {index} is missing or damaged; `ptql fit` does it again")
        return found

    def check_block(self, index: int) -> None:
        """Raise `InputError` unless a block of the run's model is the one in its ledger."""
        prefix, packed = f"{self.packed.family.blocks}.{index}.", self.packed.read_block(index)
        for name, tensor in self.record(index).stored.items():
            if prefix + name not in packed or not torch.equal(packed[prefix + name], tensor):
                raise InputError(
                    f"{self.packed.directory}: block {index} is not the one in the run's ledger; remove the folder, "
                    "and `ptql fit` writes it anew"
                )

    def ranges(self, record: BlockRecord, device: torch.device) -> dict[str, InputRange]:
        """Ranges in the full-precision block, by linear layer, as far as the record tells: magnitudes."""
        found = {}
        for group in self.source.layout.linears:
            absmax, mean = (size.to(device) for size in record.magnitudes(group[0]))
            found |= dict.fromkeys(group, InputRange.of_magnitudes(absmax, mean))
        return found


def source_of(run: Path, original: bool = False) -> str:
    """Where the full-precision model of a finished run is; with `original`, the one from which it was restored, if it
    was."""
    fit = read_metrics(run / METRICS).get("fit", {})
    source = (fit.get("original") if original else None) or fit.get("source")
    if not isinstance(source, str):
        raise InputError(f"{run / METRICS}: does not say what the source was; measure it with --model.source DIR")
    return source


def _recipe(config: Path) -> QuantLM:
    """The recipe that a run's configuration describes; its classes are made, so this is as trusted as a program."""
    try:
        stored = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{config}: the run's recipe can't be read there ({reason}); restore the file") from None
    with told_as_input():
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(QuantLM, "model")
        return parser.instantiate_classes(parser.parse_object({"model": stored}))["model"]

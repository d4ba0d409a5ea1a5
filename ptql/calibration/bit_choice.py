"""The choice that a budget of bits leaves: what is measured for it, kept in the ledger, and said of it."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ptql.calibration.bit_budget import BitPlan
from ptql.calibration.block_reader import BlockReader
from ptql.calibration.memory import give_back_memory
from ptql.calibration.preparation import Plan
from ptql.calibration.sensitivity import Walk
from ptql.disk import put_text
from ptql.evaluation.size import layer_sizes
from ptql.functional.allocation import Candidate, allocate, scores
from ptql.report.numbers import duration

if TYPE_CHECKING:
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer

FILE = "bits.json"
SAMPLES, TOKENS = 8, 128  # of the calibration windows, from their beginnings
LINE_EVERY_SECONDS = 20.0


def with_chosen_bits(trainer: BlockTrainer, model: QuantLM, plan: Plan) -> Plan:
    """The plan, and the model, with the formats that the budget leads to: an earlier process's choice, or a new one."""
    if (bits := plan.bits) is None:
        return plan
    if not trainer.ranks.all("bits" in trainer.ledger.manifest):
        measured = scores(*_measured(trainer, plan, bits), bits.reference)
        give_back_memory()
        units = [
            [Candidate(*pair) for pair in zip(*unit, strict=True)] for unit in zip(bits.sizes, measured, strict=True)
        ]
        choice = torch.tensor([bits.schemes[place].bits for place in allocate(units, bits.total)])
        trainer.ranks.copy_from_first([choice])  # equal already, unless sums were not: all must have the same
        trainer.ledger.manifest["bits"] = dict(zip((unit.name for unit in bits.units), choice.tolist(), strict=True))
        if trainer.is_global_zero:
            trainer.ledger.start()
    model.layer_schemes = bits.chosen(list(trainer.ledger.manifest["bits"].values()))
    added = model.added_biases(plan.source.block(0), plan.source)
    plan = replace(plan, stored_as=model.packed_format(plan.source, added))
    if trainer.is_global_zero:
        found = bits_found(plan)
        shares = ", ".join(f"{share:.1%} at {width}" for width, share in found["share_of_weights"].items())
        print(f"ptql: bits: {found['reached']:.4f} per weight of a budget of {found['budget']:g}; {shares}")
    return plan


def bits_found(plan: Plan) -> dict[str, Any]:
    """What became of the budget: the section `bits` of metrics.json."""
    assert plan.bits is not None
    sizes, layers, by_width = layer_sizes(plan.source, plan.stored_as), {}, Counter[str]()
    for key, size in sizes.items():
        index, _, linear = key.partition(".")
        scheme = plan.stored_as.schemes.of(int(index), linear)
        layers[key] = scheme.name if scheme.balanced else scheme.bits  # as --model.layers takes them
        by_width[scheme.name] += size.weights
    weights, widths = by_width.total(), sorted(by_width, key=lambda name: float(name.removesuffix("b")))
    return {
        "budget": plan.bits.budget.bits,
        "choices": list(plan.bits.budget.choices),
        "reached": sum(size.bits for size in sizes.values()) / weights,
        "share_of_weights": {width: round(by_width[width] / weights, 4) for width in widths},
        "layers": layers,
    }


def _measured(trainer: BlockTrainer, plan: Plan, bits: BitPlan) -> tuple[list[list[float]], list[float]]:
    """Errors of each unit with each scheme, and what the reference does to the model's output; blocks that an earlier
    process measured are passed quickly."""
    source, ranks, device = plan.source, trainer.ranks, trainer.strategy.root_device
    path = trainer.ledger.folder / FILE
    kept = _read(path)
    windows = ranks.share(plan.windows[: -(-SAMPLES // ranks.size) * ranks.size, :TOKENS])
    walk = Walk(source, bits.units, bits.schemes, bits.reference, windows, device, ranks, plan.budget, trainer.run_dir)
    progress = _Progress(trainer, source.num_blocks, len(bits.schemes))
    with BlockReader(source, device) as reader:
        for index in range(source.num_blocks):
            block = reader.block(index)
            reader.ahead(index + 1)
            known = ranks.all(str(index) in kept)
            found = walk.block(index, block, known)
            if not known:
                kept[str(index)] = found
                if trainer.is_global_zero:
                    put_text(path, json.dumps(kept) + "\n")
            progress.block_ends(index, known)
    return [errors for index in range(source.num_blocks) for errors in kept[str(index)]], walk.divergences()


def _read(path: Path) -> dict[str, list[list[float]]]:
    """What was measured by block; nothing if the file is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


class _Progress:
    """Lines that say how far measuring is, and how long it will take; none where a run shows no progress.

    Args:
        trainer: Of the run.
        blocks: Of the model.
        schemes: That each unit is rounded to.
    """

    def __init__(self, trainer: BlockTrainer, blocks: int, schemes: int) -> None:
        self._shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        self._blocks, self._schemes = blocks, schemes
        self._began = self._said = time.monotonic()
        self._work = 0

    def block_ends(self, index: int, known: bool) -> None:
        """All streams are through block `index`, whose errors were `known` before."""
        self._work += index + (1 if known else self._schemes)  # a pass of each stream that is there, and one a scheme
        now, last = time.monotonic(), index + 1 == self._blocks
        if not self._shown or (now - self._said < LINE_EVERY_SECONDS and not last):
            return
        self._said = now
        rest = sum(later + self._schemes for later in range(index + 1, self._blocks))
        left = "" if last else f"  {duration((now - self._began) * rest / self._work)} left"
        print(f"bits: block {index + 1}/{self._blocks} measured{left}", file=sys.stderr, flush=True)

"""The choice that a budget of bits leaves: what is measured for it, kept in the ledger, and said of it."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ptql.calibration.bit_budget import BitPlan
from ptql.calibration.block_reader import BlockReader
from ptql.calibration.memory import give_back_memory
from ptql.calibration.preparation import Plan
from ptql.calibration.sensitivity import ChoiceWalk, ContextWalk, UnitWalk, Walk
from ptql.disk import put_text
from ptql.evaluation.size import layer_sizes
from ptql.functional.allocation import Candidate, allocate, evenly_spread, scores
from ptql.parts.inputs import InputRange
from ptql.recipe import IntScheme
from ptql.report.numbers import duration

if TYPE_CHECKING:
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer

FILE = "bits.json"
SAMPLES, TOKENS = 8, 128  # of the calibration windows, from their beginnings
BOUNDS = (0.5, 4.0)  # of a unit's harm over error, in times of what is usual
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)  # of rounding errors, of which one is taken
MOST_LOST = 1.0  # nats, with one width for all
LINE_EVERY_SECONDS = 20.0


def with_chosen_bits(trainer: BlockTrainer, model: QuantLM, plan: Plan) -> Plan:
    """The plan, and the model, with the formats that the budget leads to: an earlier process's choice, or a new one."""
    if (bits := plan.bits) is None:
        return plan
    manifest = trainer.ledger.manifest
    if not trainer.ranks.all("bits" in manifest):
        if trainer.is_global_zero and not model.weight_quantizer.begins_on_inputs:
            print("ptql: bits: choices are better where clipping begins on inputs: -c presets/low_bits")
        manifest["bits"] = _Choosing(trainer, model, plan, bits).chosen()
        give_back_memory()
        if trainer.is_global_zero:
            trainer.ledger.start()
    model.layer_schemes = bits.chosen([manifest["bits"]["widths"][unit.name] for unit in bits.units])
    added = model.added_biases(plan.source.block(0), plan.source)
    plan = replace(plan, stored_as=model.packed_format(plan.source, added))
    if trainer.is_global_zero:
        found = bits_found(trainer, plan)
        shares = ", ".join(f"{share:.1%} at {width}" for width, share in found["share_of_weights"].items())
        lost, alike = found["divergence"], found["uniform"]
        print(
            f"ptql: bits: {found['reached']:.4f} per weight of a budget of {found['budget']:g}: {shares}; "
            f"before learning {lost:.3g} nats lost, with {alike['bits']} bits for all {alike['divergence']:.3g}"
        )
    return plan


def bits_found(trainer: BlockTrainer, plan: Plan) -> dict[str, Any]:
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
        **{key: value for key, value in trainer.ledger.manifest["bits"].items() if key != "widths"},
        "share_of_weights": {width: round(by_width[width] / weights, 4) for width in widths},
        "layers": layers,
    }


class _Choosing:
    """Measures what rounding each unit does, makes choices of that, and tries them.

    Args:
        trainer: Has the processes and the ledger.
        model: The recipe; its quantisers round as they begin.
        plan: Of the run.
        bits: What there is to choose.
    """

    def __init__(self, trainer: BlockTrainer, model: QuantLM, plan: Plan, bits: BitPlan) -> None:
        self._trainer, self._model, self._plan, self._bits = trainer, model, plan, bits
        self._ranks, self._path = trainer.ranks, trainer.ledger.folder / FILE
        self._inputs: dict[str, InputRange] = {}
        """What the layers of the block in hand read in full precision, where a quantiser begins on that."""

    def chosen(self) -> dict[str, Any]:
        """The width of each unit by name, and what is lost with it and with one width for all; equal in all processes.

        What is measured of one unit in full precision adds up only where little is lost; of one unit among rounded
        ones, it holds near them only. So what follows from either, from errors alone, and what needs no measuring, are
        tried as a whole, and the best is taken.

        Learning will leave far less than rounding loses at few bits, where hardly anything is left of a model and its
        predictions no longer say which choice is better. So both are done with a share of all errors, as much of
        them as leaves the model standing with one width for all.
        """
        bits, (errors, harm) = self._bits, self._measured()
        at = [of_unit[bits.reference] for of_unit in errors]
        alike = (bits.uniform,) * len(bits.units)
        share = self._bearable(self._tried([(alike, share) for share in SHARES]))
        in_context = self._in_context(errors, share)
        choices = [alike, self._by_turns()]
        for found in (
            scores(errors, harm, at, *BOUNDS),
            scores(errors, harm, at, 1.0, 1.0),
            scores(errors, *in_context, *BOUNDS),
        ):
            choices += [self._allocated(found, narrow) for narrow in (False, True)]
        parts = sorted({share, 1.0})
        tried = self._tried([(choice, part) for part in parts for choice in choices])
        lost = torch.tensor(tried, dtype=torch.float64).nan_to_num(torch.inf).view(len(parts), -1)
        self._ranks.copy_from_first([lost])  # equal already, unless sums over processes were not
        best, whole = int(lost[0].argmin()), lost[-1]
        return {
            "widths": {unit.name: width for unit, width in zip(bits.units, choices[best], strict=True)},
            "divergence": whole[best].item(),
            "uniform": {"bits": bits.uniform, "divergence": whole[0].item()},
            "share_of_errors": share,
        }

    def _bearable(self, lost: list[float]) -> float:
        """The largest share of errors with which no more than `MOST_LOST` is lost; the smallest if there is none."""
        found = torch.tensor(lost, dtype=torch.float64).nan_to_num(torch.inf)
        self._ranks.copy_from_first([found])
        return next(
            (share for share, nats in zip(SHARES, found.tolist(), strict=True) if nats <= MOST_LOST), SHARES[-1]
        )

    def _by_turns(self) -> tuple[int, ...]:
        """The width that all can have, and the next one in as many whole blocks as fit: what needs no measuring."""
        bits, widths = self._bits, self._bits.budget.choices
        at, blocks = widths.index(bits.uniform), sorted({unit.block for unit in bits.units})
        if at + 1 == len(widths):
            return (bits.uniform,) * len(bits.units)
        for count in range(len(blocks), 0, -1):
            raised = {blocks[place] for place in evenly_spread(count, len(blocks))}
            places = [at + (unit.block in raised) for unit in bits.units]
            if sum(sizes[place] for sizes, place in zip(bits.sizes, places, strict=True)) <= bits.total:
                return tuple(widths[place] for place in places)
        return (bits.uniform,) * len(bits.units)

    def _allocated(self, found: list[list[float]], narrow: bool) -> tuple[int, ...]:
        """The widths with the least sum of scores; `narrow` ones are at most a step from what all can have."""
        widths = self._bits.budget.choices
        at = widths.index(self._bits.uniform)
        some = slice(max(at - 1, 0), at + 2) if narrow else slice(None)
        units = [
            [Candidate(*pair) for pair in zip(*unit, strict=True)][some]
            for unit in zip(self._bits.sizes, found, strict=True)
        ]
        return tuple(widths[some][place] for place in allocate(units, self._bits.total))

    def _measured(self) -> tuple[list[list[float]], list[float]]:
        """Errors of each unit with each scheme, and what the reference does to the model's output.

        Errors are kept by block: those that an earlier process measured are not measured again.
        """
        kept, bits, blocks = _read(self._path), self._bits, self._plan.source.num_blocks
        walk = self._walk(len(bits.units))
        units = UnitWalk(walk, bits.units, bits.schemes, bits.reference, self._rounded)
        progress = _Progress(self._trainer, blocks, len(bits.schemes), "rounded by itself")
        for index, block in self._blocks(walk):
            known = self._ranks.all(str(index) in kept)
            found = units.block(index, block, known)
            if not known:
                kept[str(index)] = found
                if self._trainer.is_global_zero:
                    put_text(self._path, json.dumps(kept) + "\n")
            progress.block_ends(index, known)
        return [errors for index in range(blocks) for errors in kept[str(index)]], walk.divergences()

    def _in_context(self, errors: list[list[float]], share: float) -> tuple[list[float], list[float]]:
        """What a width less for one unit does where all others have the reference, with a share of all errors, and by
        how much error; the share is a factor of all harms, which the scores leave out."""
        bits, plan = self._bits, self._plan
        other = bits.reference - 1 if bits.reference else 1
        walk, base = self._walk(len(bits.units) + 1), bits.chosen([bits.schemes[bits.reference].bits] * len(bits.units))
        units = ContextWalk(walk, bits.units, base, bits.schemes[other], self._rounded, share)
        progress = _Progress(self._trainer, plan.source.num_blocks, 1, "rounded with all others")
        for index, block in self._blocks(walk):
            units.block(index, block, plan.source.layout.names)
            progress.block_ends(index)
        before, *after = walk.divergences()
        return [lost - before for lost in after], [unit[other] - unit[bits.reference] for unit in errors]

    def _tried(self, choices: list[tuple[tuple[int, ...], float]]) -> list[float]:
        """What is lost when all is rounded, with each choice, and a share of the errors."""
        walk = self._walk(len(choices))
        trial = ChoiceWalk(walk, [(self._bits.chosen(choice), share) for choice, share in choices], self._rounded)
        for index, block in self._blocks(walk):
            trial.block(index, block, self._plan.source.layout.names)
        return walk.divergences()

    def _walk(self, beside: int) -> Walk:
        windows = self._plan.windows[: -(-SAMPLES // self._ranks.size) * self._ranks.size, :TOKENS]
        source, device = self._plan.source, self._trainer.strategy.root_device
        share, folder = self._ranks.share(windows), self._trainer.run_dir
        return Walk(source, share, device, self._ranks, self._plan.budget, folder, beside)

    def _blocks(self, walk: Walk) -> Iterator[tuple[int, nn.Module]]:
        """The blocks in order, for a walk that stands before each."""
        with BlockReader(self._plan.source, self._trainer.strategy.root_device) as reader:
            for index in range(self._plan.source.num_blocks):
                block = reader.block(index)
                reader.ahead(index + 1)
                if self._model.weight_quantizer.begins_on_inputs:
                    self._inputs = walk.inputs(index, block)
                yield index, block

    def _rounded(self, name: str, w: Tensor, scheme: IntScheme) -> Tensor:
        """A matrix of the block in hand as the recipe's quantiser has it before anything is learned."""
        quantizer = self._model.weight_quantizer.for_linear(name, w, scheme).to(w.device)
        if self._model.weight_quantizer.begins_on_weights:
            quantizer.begin_on(w, self._inputs.get(name))
        return quantizer.fake(w).detach()


def _read(path: Path) -> dict[str, list[list[float]]]:
    """What was measured, by block; nothing if the file is missing or damaged."""
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
        what: Is measured of them.
    """

    def __init__(self, trainer: BlockTrainer, blocks: int, schemes: int, what: str) -> None:
        self._what = what
        self._shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        self._blocks, self._schemes = blocks, schemes
        self._began = self._said = time.monotonic()
        self._work = 0

    def block_ends(self, index: int, known: bool = False) -> None:
        """All streams are through block `index`, whose errors were `known` before."""
        self._work += index + (1 if known else self._schemes)  # a pass of each stream that is there, and one a scheme
        now, last = time.monotonic(), index + 1 == self._blocks
        if not self._shown or (now - self._said < LINE_EVERY_SECONDS and not last):
            return
        self._said = now
        rest = sum(later + self._schemes for later in range(index + 1, self._blocks))
        left = "" if last else f"  {duration((now - self._began) * rest / self._work)} left"
        print(f"bits: groups {self._what}: block {index + 1}/{self._blocks}{left}", file=sys.stderr, flush=True)

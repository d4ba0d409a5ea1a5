"""A budget of bits, and what it leaves to choose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ptql.calibration.sensitivity import Unit
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.evaluation.size import LayerSize, layer_sizes
from ptql.recipe import IntScheme, LayerSchemes

if TYPE_CHECKING:
    from ptql.calibration.quant_lm import QuantLM

CHOICES = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class BitBudget:
    """What is given.

    Args:
        bits: That may be stored for each quantised weight, on average: codes, scales, zero points, biases, factors.
        choices: Widths of codes, in ascending order.
    """

    bits: float
    choices: tuple[int, ...]

    @classmethod
    def given(cls, bits: float | None, choices: list[int] | None, weight: IntScheme) -> BitBudget | None:
        """Of the options; None without a budget.

        Raises:
            InputError: Choices without a budget, fewer than two, or one that `weight` can't have; a `weight` that
                leaves nothing to measure before blocks learn.
        """
        if bits is None:
            if choices is not None:
                raise InputError(f"bits_choices={choices}: without a budget nothing is chosen; give --bits_budget, too")
            return None
        widths = tuple(sorted(set(CHOICES if choices is None else choices)))
        if len(widths) < 2 or widths[-1] > 8:
            raise InputError(f"bits_choices={list(widths)}: two or more of the widths 1 to 8; leave it out for most")
        if weight.salient is not None:
            raise InputError(
                f"bits_budget={bits:g} with salient={weight.salient}: signs have no width to choose; leave bits_budget "
                "out, or use another method"
            )
        if weight.clustered:
            raise InputError(
                f"bits_budget={bits:g} with clustered=true: widths are chosen before blocks have clusters; leave "
                "bits_budget out, or use --model.weight.clustered false"
            )
        for width in widths:
            replace(weight, bits=width, balanced=False)  # which refuses what is no format
        return cls(bits, widths)

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class BitPlan:
    """What there is to choose, and what it takes.

    Args:
        budget: What was given.
        fixed: Formats of layers that the recipe names: they keep them.
        units: What gets bits, in the order of blocks.
        schemes: The formats to choose from, by ascending bits.
        sizes: Of each unit, the bits that are stored with each scheme.
        total: Bits that all units may take.
        uniform: The largest width that all units can have.
    """

    budget: BitBudget
    fixed: Mapping[str, IntScheme]
    units: tuple[Unit, ...]
    schemes: tuple[IntScheme, ...]
    sizes: tuple[tuple[int, ...], ...]
    total: int
    uniform: int

    @property
    def reference(self) -> int:
        """The scheme nearest to the budget, by index; the larger of two."""
        places = reversed(range(len(self.schemes)))
        return min(places, key=lambda place: abs(self.schemes[place].bits - self.budget.bits))

    def chosen(self, bits: Sequence[int]) -> LayerSchemes:
        """Formats of all layers where units have these widths; the default is what most of them have."""
        by_width = {scheme.bits: scheme for scheme in self.schemes}
        of_units = {
            f"{unit.block}.{name}": by_width[width]
            for unit, width in zip(self.units, bits, strict=True)
            for name in unit.linears
        }
        ((most, _),) = Counter(of_units.values()).most_common(1)
        return LayerSchemes(most, {**of_units, **self.fixed})


def plan_bits(model: QuantLM, source: Checkpoint, budget: BitBudget) -> BitPlan:
    """What a budget leaves to choose. Until it is chosen, the model has one format, the largest that meets the budget.

    Raises:
        InputError: The choices can't meet the budget, or the recipe leaves nothing to choose.
    """
    fixed = model.layer_schemes.exceptions
    if any(scheme.salient is not None for scheme in fixed.values()):
        raise InputError(
            "layers: salient channels beside a budget: what they lose is not measured; leave them, or bits_budget, out"
        )
    if any(scheme.by_cluster for scheme in fixed.values()):
        raise InputError(
            "layers: clustered=true beside a budget: widths are chosen before blocks have clusters; leave it, or "
            "bits_budget, out"
        )
    units = tuple(
        Unit(index, free)
        for index in range(source.num_blocks)
        for group in source.layout.linears
        if (free := tuple(name for name in group if f"{index}.{name}" not in fixed))
    )
    if not units:
        raise InputError("layers: every layer is named there, so that nothing is left to choose; leave bits_budget out")
    added, sizes = model.added_biases(source.block(0), source), {}
    for bits in budget.choices:
        scheme = replace(model.weight, bits=bits, balanced=False)
        model.layer_schemes = LayerSchemes(scheme, fixed)
        sizes[scheme] = layer_sizes(source, model.packed_format(source, added))
    needed = {scheme: sum(layer.bits for layer in of_layers.values()) for scheme, of_layers in sizes.items()}
    weights = sum(layer.weights for layer in next(iter(sizes.values())).values())
    low, high = min(needed.values()) / weights, max(needed.values()) / weights
    if not low <= budget.bits <= high:
        raise InputError(
            f"bits_budget={budget.bits:g}: with codes of {budget.choices[0]} to {budget.choices[-1]} bits, what is "
            f"stored takes {low:.4f} to {high:.4f} bits per weight here; give a number between"
        )
    total = math.floor(budget.bits * weights)
    uniform = [scheme for scheme in needed if needed[scheme] <= total][-1]
    model.layer_schemes = LayerSchemes(uniform, fixed)
    return BitPlan(
        budget,
        fixed,
        units,
        tuple(sizes),
        tuple(tuple(_bits_of(unit, of_layers) for of_layers in sizes.values()) for unit in units),
        total - sum(layer.bits for key, layer in next(iter(sizes.values())).items() if key in fixed),
        uniform.bits,
    )


def _bits_of(unit: Unit, sizes: Mapping[str, LayerSize]) -> int:
    return sum(sizes[f"{unit.block}.{name}"].bits for name in unit.linears)

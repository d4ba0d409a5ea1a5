"""What rounding some matrices of a model does to it, and rounding all: measured with one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ptql.calibration.activations import PASS_BYTES, move
from ptql.calibration.memory_budget import Budget
from ptql.calibration.ranks import Ranks
from ptql.calibration.statistics import observe_inputs
from ptql.calibration.stream_store import StreamStore
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.functional.losses import kl_divergence, mean_squared_error, relative_squared_error
from ptql.nn.student import run_block
from ptql.parts.inputs import InputRange
from ptql.parts.transforms import Weights
from ptql.recipe import IntScheme, LayerSchemes

Rounding = Callable[[str, Tensor, IntScheme], Tensor]
"""Makes the rounded matrix [out, in] of a layer's name in its block, its weights, and a format."""


@dataclass(frozen=True)
class Unit:
    """Matrices that share an input and get the same number of bits: runtimes make one matrix of them.

    Args:
        block: Index, from 0.
        linears: Their names in the block.
    """

    block: int
    linears: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the first of them, as in `LayerSchemes`."""
        return f"{self.block}.{self.linears[0]}"


class Walk:
    """Windows that pass through a model block by block: one stream in full precision, others beside it.

    Args:
        source: The model.
        windows: Token ids [samples, tokens], of this process.
        device: Where blocks run.
        ranks: The processes that share the windows.
        budget: Decides where streams lie.
        folder: For streams on disk.
        beside: How many streams there will be beside the first.
    """

    @torch.no_grad()
    def __init__(
        self,
        source: Checkpoint,
        windows: Tensor,
        device: torch.device,
        ranks: Ranks,
        budget: Budget,
        folder: Path,
        beside: int,
    ) -> None:
        self.ranks = ranks
        self._source, self._windows, self._device = source, windows, device
        shell = source.shell()
        hidden, contexts = shell.embed(windows[:1])
        self._contexts = move(contexts, device)
        place = budget.place(device, 4 * len(windows) * hidden.numel(), beside + 3)
        self._store = StreamStore(place, device, folder, ranks.rank)
        self._at_once = max(PASS_BYTES // (4 * hidden.numel()), 1)
        self.full = self._store.empty((len(windows), *hidden.shape[1:]), torch.float32)
        self.full.copy_(shell.embed(windows)[0])
        self.beside: list[Tensor] = []

    def empty(self) -> Tensor:
        """Room for a stream."""
        return self._store.empty(tuple(self.full.shape), self.full.dtype)

    def run(self, index: int, block: nn.Module, hidden: Tensor, out: Tensor, weights: Weights | None = None) -> Tensor:
        """What block `index` makes of a stream, in `out`, which may be the stream."""
        return run_block(block, hidden, self._contexts[index], self._at_once, weights, out)

    @torch.no_grad()
    def inputs(self, index: int, block: nn.Module) -> dict[str, InputRange]:
        """What the linear layers of a block read of the stream in full precision."""
        with observe_inputs(block, self._source.layout, self.full.shape[1], self.ranks) as ranges:
            self.run(index, block, self.full, self.empty())
        return ranges()

    def target(self, index: int, block: nn.Module) -> Tensor:
        """What a block makes of the stream in full precision, which stays where it is.

        Raises:
            InputError: The block's weights are damaged.
        """
        made = self.run(index, block, self.full, self.empty())
        if not self.ranks.all(bool(made.isfinite().all())):
            raise InputError(
                f"{self._source.directory}: block {index} gives numbers that are not finite; its weights are damaged: "
                "fetch the model again"
            )
        return made

    @torch.no_grad()
    def divergences(self) -> list[float]:
        """After the last block: how far what each stream predicts is from full precision.

        The Kullback-Leibler divergence in nats, mean over tokens.
        """
        shell = self._source.shell().to(self._device)
        found = torch.zeros(len(self.beside), dtype=torch.float64)
        for sample, ids in enumerate(self._windows.to(self._device).split(1)):
            here = slice(sample, sample + 1)
            expected = shell.logits(self.full[here].to(self._device), ids).log_softmax(-1)
            for place, stream in enumerate(self.beside):
                found[place] += kl_divergence(shell.logits(stream[here].to(self._device), ids), expected).item()
        return self.ranks.mean(found / len(self._windows)).tolist()


class UnitWalk:
    """Rounds one unit at a time: the error of its block's output, and a stream that goes on in full precision.

    Args:
        walk: Before the first block.
        units: In the order of their blocks.
        schemes: What they are rounded to.
        reference: The one of them, by index, with which the stream of a unit goes on.
        rounding: Makes rounded matrices.
    """

    def __init__(
        self, walk: Walk, units: Sequence[Unit], schemes: Sequence[IntScheme], reference: int, rounding: Rounding
    ) -> None:
        self.walk, self._units, self._schemes, self._reference = walk, units, schemes, reference
        self._rounding = rounding

    @torch.no_grad()
    def block(self, index: int, block: nn.Module, known: bool = False) -> list[list[float]]:
        """Take all streams through a block; returns the error of its output for each of its units and each scheme.

        That is the squared error relative to each token's own square, mean over tokens, plus that relative to the
        square of all tokens. The first sees every token alike. Of the second nearly all is the few massive tokens, if
        there are any: a model breaks with them. With `known` errors are not asked for.
        """
        walk = self.walk
        for stream in walk.beside:
            walk.run(index, block, stream, stream)
        target, scratch, measured = walk.target(index, block), walk.empty(), []
        for unit in (unit for unit in self._units if unit.block == index):
            walk.beside.append(walk.empty())
            for place, scheme in enumerate(self._schemes):
                if place == self._reference or not known:
                    out = walk.beside[-1] if place == self._reference else scratch
                    weights = rounded_weights(block, dict.fromkeys(unit.linears, scheme), self._rounding)
                    walk.run(index, block, walk.full, out, weights)
                    measured.append(torch.stack([mean_squared_error(out, target), relative_squared_error(out, target)]))
        walk.full = target
        if known or not measured:
            return []
        square = walk.ranks.mean(target.square().mean().cpu())
        of_all, of_each = walk.ranks.mean(torch.stack(measured).cpu()).double().unbind(1)
        return (of_all / square + of_each).view(-1, len(self._schemes)).tolist()


class ContextWalk:
    """Rounds all matrices, and in a stream for each unit this one otherwise.

    After the last block, the first stream is that without a difference.

    Args:
        walk: Before the first block.
        units: In the order of their blocks.
        base: Formats of all layers.
        other: Of a unit in its stream.
        rounding: Makes rounded matrices.
        share: Of every rounding error, that is made.
    """

    @torch.no_grad()
    def __init__(
        self,
        walk: Walk,
        units: Sequence[Unit],
        base: LayerSchemes,
        other: IntScheme,
        rounding: Rounding,
        share: float = 1.0,
    ) -> None:
        self.walk, self._units, self._base, self._other = walk, units, base, other
        self._rounding, self._share = rounding, share
        walk.beside = [walk.empty().copy_(walk.full)]

    @torch.no_grad()
    def block(self, index: int, block: nn.Module, linears: Sequence[str]) -> None:
        """Take all streams through a block, whose `linears` are rounded."""
        walk, schemes = self.walk, {name: self._base.of(index, name) for name in linears}
        weights = rounded_weights(block, schemes, self._rounding, self._share)
        for stream in walk.beside[1:]:
            walk.run(index, block, stream, stream, weights)
        for unit in (unit for unit in self._units if unit.block == index):
            changed = rounded_weights(block, dict.fromkeys(unit.linears, self._other), self._rounding, self._share)
            walk.beside.append(walk.run(index, block, walk.beside[0], walk.empty(), {**weights, **changed}))
        walk.run(index, block, walk.beside[0], walk.beside[0], weights)
        walk.full = walk.target(index, block)


class ChoiceWalk:
    """Rounds all matrices, in a stream for each of several choices of formats.

    Args:
        walk: Before the first block.
        choices: Formats of all layers, and the share of every rounding error that is made: 1 is rounding.
        rounding: Makes rounded matrices.
    """

    @torch.no_grad()
    def __init__(self, walk: Walk, choices: Sequence[tuple[LayerSchemes, float]], rounding: Rounding) -> None:
        self.walk, self._choices, self._rounding = walk, choices, rounding
        walk.beside = [walk.empty().copy_(walk.full) for _ in choices]

    @torch.no_grad()
    def block(self, index: int, block: nn.Module, linears: Sequence[str]) -> None:
        """Take all streams through a block, whose `linears` are rounded."""
        rounding = cache(self._rounding)  # choices have most formats in common
        for stream, (choice, share) in zip(self.walk.beside, self._choices, strict=True):
            schemes = {name: choice.of(index, name) for name in linears}
            self.walk.run(index, block, stream, stream, rounded_weights(block, schemes, rounding, share))
        self.walk.full = self.walk.target(index, block)


def rounded_weights(block: nn.Module, schemes: dict[str, IntScheme], rounding: Rounding, share: float = 1.0) -> Weights:
    """The matrices of a block that have these formats, by name; those that are not quantised are left out.

    With a `share` below 1 each is only so far on its way to the rounded one.
    """
    made = {}
    for name, scheme in schemes.items():
        if scheme.quantised:
            weight = block.get_parameter(f"{name}.weight")
            rounded = rounding(name, weight, scheme)
            made[f"{name}.weight"] = rounded if share == 1 else weight.float().lerp(rounded.float(), share)
    return made

"""What rounding some matrices of a model does to it: measured in full precision, with one block in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ptql.calibration.activations import PASS_BYTES, move
from ptql.calibration.memory_budget import Budget
from ptql.calibration.ranks import Ranks
from ptql.calibration.stream_store import StreamStore
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.functional.clipping import round_clipped
from ptql.functional.losses import kl_divergence, mean_squared_error, relative_squared_error
from ptql.nn.student import run_block, weights_of
from ptql.parts.transforms import Weights
from ptql.recipe import IntScheme


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
    """Windows on their way through the full-precision model, and beside them what comes of them by rounding one unit.

    There is a stream for each unit: it leaves the model's own at the unit's block, in which this unit is rounded to
    the reference, and goes on through the later blocks in full precision.

    Args:
        source: The model.
        units: In the order of their blocks.
        schemes: What units are rounded to.
        reference: The one of them, by index, whose effect on the model's output is measured.
        windows: Token ids [samples, tokens], of this process.
        device: Where blocks run.
        ranks: The processes that share the windows.
        budget: Decides where streams lie.
        folder: For streams on disk.
    """

    @torch.no_grad()
    def __init__(
        self,
        source: Checkpoint,
        units: Sequence[Unit],
        schemes: Sequence[IntScheme],
        reference: int,
        windows: Tensor,
        device: torch.device,
        ranks: Ranks,
        budget: Budget,
        folder: Path,
    ) -> None:
        self._source, self._units, self._schemes, self._reference = source, units, schemes, reference
        self._windows, self._device, self._ranks = windows, device, ranks
        shell = source.shell()
        hidden, contexts = shell.embed(windows[:1])
        self._contexts = move(contexts, device)
        shape = (len(windows), *hidden.shape[1:])
        place = budget.place(device, 4 * len(windows) * hidden.numel(), len(units) + 3)
        self._store = StreamStore(place, device, folder, ranks.rank)
        self._hidden = self._store.empty(shape, torch.float32)
        self._hidden.copy_(shell.embed(windows)[0])
        self._rounded: list[Tensor] = []
        self._at_once = max(PASS_BYTES // (4 * hidden.numel()), 1)

    @torch.no_grad()
    def block(self, index: int, block: nn.Module, known: bool = False) -> list[list[float]]:
        """Take all streams through a block; returns the error of its output for each of its units and each scheme.

        That is the squared error relative to each token's own square, mean over tokens, plus that relative to the
        square of all tokens. The first sees every token alike. Of the second nearly all is the few massive tokens, if
        there are any: a model breaks with them. With `known` errors are not asked for.

        Raises:
            InputError: The block's weights are damaged.
        """
        context = self._contexts[index]
        for stream in self._rounded:
            run_block(block, stream, context, self._at_once, out=stream)
        with _input_shares(block, self._source.layout.linears) as shares:
            target = run_block(block, self._hidden, context, self._at_once, out=self._stream())
        if not self._ranks.all(bool(target.isfinite().all())):
            raise InputError(
                f"{self._source.directory}: block {index} gives numbers that are not finite; its weights are damaged: "
                "fetch the model again"
            )
        measured, scratch = [], self._stream()
        for unit in (unit for unit in self._units if unit.block == index):
            importance = self._ranks.mean(shares[unit.linears[0]])
            self._rounded.append(self._stream())
            for place, scheme in enumerate(self._schemes):
                if place == self._reference or not known:
                    out = self._rounded[-1] if place == self._reference else scratch
                    weights = _rounded(block, unit, scheme, importance)
                    run_block(block, self._hidden, context, self._at_once, weights, out)
                    measured.append(torch.stack([mean_squared_error(out, target), relative_squared_error(out, target)]))
        self._hidden = target
        if known or not measured:
            return []
        square = self._ranks.mean(target.square().mean().cpu())
        of_all, of_each = self._ranks.mean(torch.stack(measured).cpu()).double().unbind(1)
        return (of_all / square + of_each).view(-1, len(self._schemes)).tolist()

    @torch.no_grad()
    def divergences(self) -> list[float]:
        """After the last block: for each unit, what rounding it to the reference does to the model's predictions.

        The Kullback-Leibler divergence from full precision, in nats, mean over tokens.
        """
        shell = self._source.shell().to(self._device)
        found = torch.zeros(len(self._units), dtype=torch.float64)
        for sample, ids in enumerate(self._windows.to(self._device).split(1)):
            here = slice(sample, sample + 1)
            expected = shell.logits(self._hidden[here].to(self._device), ids)
            for unit, stream in enumerate(self._rounded):
                found[unit] += kl_divergence(shell.logits(stream[here].to(self._device), ids), expected).item()
        return self._ranks.mean(found / len(self._windows)).tolist()

    def _stream(self) -> Tensor:
        return self._store.empty(tuple(self._hidden.shape), self._hidden.dtype)


def _rounded(block: nn.Module, unit: Unit, scheme: IntScheme, importance: Tensor) -> Weights:
    own, found = weights_of(block), {}
    for name in unit.linears:
        w = own[f"{name}.weight"]
        columns = scheme.columns(w.shape[1])
        found[f"{name}.weight"] = round_clipped(w, importance, scheme.levels, columns, scheme.symmetric)
    return found


@contextmanager
def _input_shares(block: nn.Module, groups: Sequence[Sequence[str]]) -> Iterator[dict[str, Tensor]]:
    """While open, forwards of `block` add up each input channel's share of its token's square, [in], by linear layer.

    Of each token's own, as in the errors: else the few tokens with massive activations would decide for all.
    """
    shares: dict[str, Tensor] = {}
    handles = []
    for group in groups:

        def add(module: nn.Module, args: tuple[Tensor, ...], group: Sequence[str] = group) -> None:
            squares = args[0].flatten(0, -2).float().square()
            share = (squares / squares.sum(-1, keepdim=True).clamp_min(1e-12)).sum(0)
            shares.update(dict.fromkeys(group, shares.get(group[0], 0) + share))

        handles.append(block.get_submodule(group[0]).register_forward_pre_hook(add))
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()

"""Second moments of what the linear layers of a student multiply: the Hessians of GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptql.calibration.activations import Streams
from ptql.families import BlockLayout
from ptql.functional import gptq
from ptql.nn.quant_linear import QuantLinear
from ptql.parts.transforms import Weights


class InputMoments:
    """Gives 2 E[x x^T], [in, in], of a linear layer's inputs x, over the tokens of all processes.

    They are the inputs that its matrix will have in the quantised model: of the quantised stream, folded as the block's
    weights are, and rounded if activations are. No transform has to say what it does to them. Layers that share an
    input share what one pass of the block found, and no other is kept beside it.

    Args:
        student: The block with stand-ins.
        layout: Of the block.
        streams: Stand before the block.
    """

    def __init__(self, student: nn.Module, layout: BlockLayout, streams: Streams) -> None:
        self._student, self._streams = student, streams
        self._group_of = {name: group for group in layout.linears for name in group}
        self._group: tuple[str, ...] = ()
        self._found: Tensor | None = None

    def __call__(self, linear: str, weights: Weights) -> Tensor:
        """Of the input of `linear` in a block with these weights; asked for in order of execution."""
        if self._found is None or linear not in self._group:
            self._found = None  # a matrix of the MLP may have hundreds of megabytes of them
            self._group = self._group_of[linear]
            self._found = self._observed(weights)
        return self._found

    def _observed(self, weights: Weights) -> Tensor:
        sums = _Sums()
        handle = self._student.get_submodule(self._group[0]).register_forward_pre_hook(sums)
        try:
            self._streams.show(self._student, weights)
        finally:
            handle.remove()
        moments = self._streams.ranks.mean(sums.moments())
        self._streams.ranks.copy_from_first([moments])  # equal already; what is encoded by them must be
        return moments


class _Sums:
    """Adds up the products of a layer's inputs without leaving the device."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._tokens = 0

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, QuantLinear)
        x = module.multiplied(args[0]).flatten(0, -2).float()
        if self._total is None:
            self._total = x.new_zeros(x.shape[1], x.shape[1])
        gptq.add_products(self._total, x)
        self._tokens += len(x)

    def moments(self) -> Tensor:
        assert self._total is not None
        return self._total.mul_(2 / self._tokens)

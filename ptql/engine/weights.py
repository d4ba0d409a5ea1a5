"""The rounded weights of a step, made once and written to where the matrix products read them."""

# axes: out, in = weight rows, columns

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ptql.functional.buffers import stacked, write_into
from ptql.functional.scaled import Scaled, multiplied_out
from ptql.nn.quant_linear import QuantLinear
from ptql.nn.signed_product import ChannelOrder, SignedProduct
from ptql.parts.weights.salient_binary import SalientBinaryLinear

if TYPE_CHECKING:
    from ptql.calibration.block_task import BlockTask


class StepWeights:
    """Memory for a block's rounded matrices; layers that share an input lie below each other in one matrix.

    Args:
        task: Of the block.
        dtype: In which matrix products read the matrices.
    """

    def __init__(self, task: BlockTask, dtype: torch.dtype) -> None:
        self._task = task
        self._groups: list[list[str]] = []
        self._buffers: list[Tensor] = []
        self._signed: list[tuple[str, SalientBinaryLinear, SignedProduct]] = []
        for group in _groups(task.student):
            if any(linear.signed is not None for linear in group.values()):
                for name, linear in group.items():
                    quantizer = task.quantizer(name)
                    assert isinstance(quantizer, SalientBinaryLinear)
                    assert linear.signed is not None
                    self._signed.append((name, quantizer, linear.signed))
                continue
            linears = list(group.values())
            rows, columns = sum(linear.out_features for linear in linears), linears[0].in_features
            self._groups.append(list(group))
            self._buffers.append(torch.empty(rows, columns, dtype=dtype, device=task.device))

    def make(self) -> dict[str, Tensor]:
        """All parameters that the block computes with; those that depend on learnables have gradients.

        The first layer of a group has the weights and biases of all of them (`MergedProduct`).
        """
        weights = self._task.folded_weights(scaled=True)
        made: dict[str, Tensor] = {}
        for name, quantizer, product in self._signed:
            matrix = weights.pop(f"{name}.weight")
            assert isinstance(matrix, Scaled)
            assert matrix.rows is None and matrix.columns is None, f"{name}: something has folded it"  # noqa: PT018
            made |= {f"{name}.signed.{part}": t for part, t in quantizer.factors(matrix.base, product).items()}
        for group, buffer in zip(self._groups, self._buffers, strict=True):
            parts, start = [], 0
            for name in group:
                matrix = weights.pop(f"{name}.weight")
                parts.append(self._rounded(name, matrix, buffer[start : start + matrix.shape[0]]))
                start += matrix.shape[0]
            made[f"{group[0]}.weight"] = parts[0] if len(parts) == 1 else stacked(buffer, parts)
            biases = [weights.pop(f"{name}.bias", None) for name in group]
            if biases[0] is not None:
                made[f"{group[0]}.bias"] = biases[0] if len(biases) == 1 else torch.cat(biases)
        return made | weights

    def _rounded(self, name: str, matrix: Scaled | Tensor, out: Tensor) -> Tensor:
        quantizer = self._task.quantizer(name)
        if quantizer is None:
            return write_into(multiplied_out(matrix), out)
        if isinstance(matrix, Tensor):  # a transform did more than scale it
            return write_into(quantizer.fake(matrix), out)
        return quantizer.fake_into(matrix, out)


def attach_signed_products(task: BlockTask, dtype: torch.dtype) -> None:
    """Let layers whose matrices are signs multiply without writing them out; `dtype` is that of matrix products.

    Of layers that share an input all or none do: they share the order of its channels.
    """
    for group in _groups(task.student):
        found = {name: task.quantizer(name) for name in group}
        signed = {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, SalientBinaryLinear)}
        salient = [quantizer.salient for quantizer in signed.values()]
        if len(signed) < len(group) or not all(torch.equal(salient[0], other) for other in salient[1:]):
            continue
        order = ChannelOrder(salient[0], readers=len(group))
        for name, quantizer in signed.items():
            with torch.no_grad():
                group[name].signed = quantizer.product(group[name].weight, order, dtype)


def _groups(student: nn.Module) -> list[dict[str, QuantLinear]]:
    """The linear layers by name, those together that can be one product, in its order."""
    found: dict[int, dict[str, QuantLinear]] = {}
    for name, module in student.named_modules():
        if isinstance(module, QuantLinear):
            product = module.merged[0] if module.merged else module
            found.setdefault(id(product), {})[name] = module
    return [dict(sorted(group.items(), key=lambda item: _part(item[1]))) for group in found.values()]


def _part(linear: QuantLinear) -> int:
    return linear.merged[1] if linear.merged else 0

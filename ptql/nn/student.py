"""The live Hugging Face block with stand-ins for its linear layers, norms and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptql.families import BlockLayout
from ptql.nn.attention import ROUNDING
from ptql.nn.quant_linear import QuantLinear, SharedRounding, ShiftedNorm
from ptql.parts.activations import ActivationQuantizer
from ptql.parts.transforms import AddedBiases, Weights
from ptql.recipe import ActivationScheme


def biased_linears(block: nn.Module, layout: BlockLayout) -> frozenset[str]:
    """The quantised layers that have a bias of their own."""
    return frozenset(name for name in layout.names if block.get_submodule(name).bias is not None)


def make_student(
    block: nn.Module,
    layout: BlockLayout,
    added: AddedBiases,
    rounding: ActivationQuantizer,
    scheme: ActivationScheme,
) -> nn.Module:
    """Swap stand-ins into `block`, in place, and return it: added biases are zero, activations are rounded."""
    for group in layout.linears:
        rounds = rounding.for_linear(group[0], scheme)
        shared = None if rounds is None else SharedRounding(rounds, readers=len(group))
        for name in group:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            weight, bias = linear.weight.detach(), linear.bias
            if bias is None and name in added.linears:
                bias = weight.new_zeros(weight.shape[0])
            block.set_submodule(name, QuantLinear(weight, bias, shared))
    for name in added.norms:
        block.set_submodule(name, ShiftedNorm(block.get_submodule(name)))
    setattr(block.get_submodule(layout.attention.module), ROUNDING, rounding.for_attention(scheme))
    return block


def weights_of(block: nn.Module) -> Weights:
    """Every parameter of a block by name, detached."""
    return {name: parameter.detach() for name, parameter in block.named_parameters()}


def call_block(block: nn.Module, hidden: Tensor, context: dict[str, Any], weights: Weights | None = None) -> Tensor:
    """The block's output [batch, tokens, hidden], with `weights` in place of its own where given."""
    out = block(hidden, **context) if weights is None else functional_call(block, weights, (hidden,), context)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def run_block(
    block: nn.Module, hidden: Tensor, context: dict[str, Any], batch_size: int, weights: Weights | None = None
) -> Tensor:
    """The block's output for all samples [samples, tokens, hidden], a batch at a time, where `hidden` lies."""
    device = next(block.parameters()).device
    outputs = torch.empty_like(hidden)
    for start in range(0, len(hidden), batch_size):
        batch = hidden[start : start + batch_size].to(device, non_blocking=True)
        outputs[start : start + batch_size] = call_block(block, batch, context, weights)
    return outputs

"""The live Hugging Face block with stand-ins for its linear layers, norms and attention."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptql.families import BlockLayout
from ptql.nn.attention import CACHE_ROUNDING, QUERY_ROUNDING
from ptql.nn.quant_linear import MergedProduct, QuantLinear, Rounding, SharedRounding, ShiftedNorm, gather_inputs
from ptql.nn.static_rounding import attach_grids
from ptql.nn.transfer import Writer, batches_on
from ptql.parts.activations import ActivationQuantizer
from ptql.parts.transforms import AddedBiases, Weights
from ptql.recipe import ActivationScheme, StaticScheme


def biased_linears(block: nn.Module, layout: BlockLayout) -> frozenset[str]:
    """The quantised layers that have a bias of their own."""
    return frozenset(name for name in layout.names if block.get_submodule(name).bias is not None)


def make_student(
    block: nn.Module,
    layout: BlockLayout,
    added: AddedBiases,
    rounding: ActivationQuantizer,
    scheme: ActivationScheme,
    kernels: bool = False,
    gathered: frozenset[str] = frozenset(),
    static: StaticScheme | None = None,
) -> nn.Module:
    """Swap stand-ins into `block`, in place, and return it: added biases are zero, activations are rounded.

    With `kernels`, rounding is one kernel on a GPU, forward and backward. Norms in `gathered` can read their input in
    another order. Grids that `static` describes are empty.
    """

    def fused(rounds: Rounding | None) -> Rounding | None:
        return rounding.fused(rounds) if kernels and rounds is not None else rounds

    device = next(block.parameters()).device
    on_grids = {} if static is None else attach_grids(block, layout.attention.module, static, device)
    for group in layout.linears:
        rounds = on_grids.get(group[0]) or fused(rounding.for_linear(group[0], scheme))
        shared = None if rounds is None else SharedRounding(rounds, readers=len(group))
        linears = []
        for name in group:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            weight, bias = linear.weight.detach(), linear.bias
            if bias is None and name in added.linears:
                bias = weight.new_zeros(weight.shape[0])
            linears.append(QuantLinear(weight, bias, shared))
            block.set_submodule(name, linears[-1])
        if len({linear.bias is None for linear in linears}) == 1 < len(linears):
            product = MergedProduct(linears, rounds)
            for index, linear in enumerate(linears):
                linear.merged = (product, index)
    for name in added.norms:
        block.set_submodule(name, ShiftedNorm(block.get_submodule(name)))
    for name in sorted(gathered):
        gather_inputs(block.get_submodule(name))
    attention = block.get_submodule(layout.attention.module)
    setattr(attention, QUERY_ROUNDING, fused(rounding.for_attention(scheme)))
    setattr(attention, CACHE_ROUNDING, fused(rounding.for_cache(scheme)))
    return block


def keep_narrow(block: nn.Module) -> None:
    """Hold each matrix of a linear layer in bfloat16 or float16 where that loses nothing: as most models are stored."""
    for module in block.modules():
        if isinstance(module, QuantLinear) and module.weight.dtype == torch.float32:
            for dtype in (torch.bfloat16, torch.float16):
                narrow = module.weight.data.to(dtype)
                if torch.equal(narrow.float(), module.weight.data):
                    module.weight.data = narrow
                    break


def weights_of(block: nn.Module) -> Weights:
    """Every parameter of a block by name, detached."""
    return {name: parameter.detach() for name, parameter in block.named_parameters()}


def call_block(block: nn.Module, hidden: Tensor, context: dict[str, Any], weights: Weights | None = None) -> Tensor:
    """The block's output [batch, tokens, hidden], with `weights` in place of its own where given."""
    out = block(hidden, **context) if weights is None else functional_call(block, weights, (hidden,), context)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def run_block(
    block: nn.Module,
    hidden: Tensor,
    context: dict[str, Any],
    batch_size: int,
    weights: Weights | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The block's output for all samples [samples, tokens, hidden], a batch at a time, where `hidden` lies.

    Args:
        block: Given batches in the widest dtype of its parameters, whatever that of `hidden` is.
        hidden: Before the block.
        context: Keyword arguments of the block.
        batch_size: Samples at a time.
        weights: In place of the block's own.
        out: Gets the output; may be `hidden`.
    """
    own = next(block.parameters())
    # a student holds its matrices as they are stored, and everything else in float32
    dtype = reduce(torch.promote_types, {parameter.dtype for parameter in block.parameters()})
    out = torch.empty_like(hidden, pin_memory=hidden.is_pinned()) if out is None else out
    with Writer(out, own.device) as writer:
        for index, batch in enumerate(batches_on(own.device, {"input": hidden}, batch_size, dtype)):
            writer.put(index * batch_size, call_block(block, batch["input"], context, weights))
    return out

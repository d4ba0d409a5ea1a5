"""What a packed model holds, layer by layer, as integers: what every target's format is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ptql.checkpoint import Checkpoint
from ptql.functional import affine
from ptql.functional.packing import unpack_levels
from ptql.recipe import IntScheme

# axes: out, in = weight rows, columns; g = groups of columns that share a scale


@dataclass(frozen=True)
class IntLayer:
    """A quantised matrix: weight = (codes - zero) * scale, in float32.

    Args:
        codes: 0 to 2^bits - 1, [out, in].
        scale: float16, one for each row and group [out, g].
        zero: The codes that stand for zero, likewise; all 2^(bits - 1) where the scheme is symmetric.
        scheme: Its format.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out g"]
    zero: UInt8[Tensor, "out g"]
    scheme: IntScheme

    @property
    def columns(self) -> int:
        """Columns of a full group."""
        return self.scheme.columns(self.codes.shape[1])

    def dense(self) -> Float[Tensor, "out in"]:
        """The float32 weight."""
        return affine.dequantize(self.codes, self.scale, self.zero, self.scheme.levels, self.columns)


def int_layer(stored: Mapping[str, Tensor], columns: int, scheme: IntScheme) -> IntLayer:
    """A stored layer of plain integers, unpacked.

    Args:
        stored: `codes`, `scale` and perhaps `zero`, as in `PackedLinear`.
        columns: Of the matrix.
        scheme: Its format; not one with salient channels, or scales of clusters.
    """
    groups = scheme.groups(columns)
    scale = stored["scale"].view(torch.float16)
    if scheme.symmetric:
        zero = torch.full(scale.shape, affine.symmetric_grid(scheme.levels)[0], dtype=torch.uint8)
    else:
        zero = unpack_levels(stored["zero"], scheme.levels, groups)
    return IntLayer(unpack_levels(stored["codes"], scheme.levels, columns), scale, zero, scheme)


def block_parts(model: Checkpoint, index: int) -> Iterator[tuple[str, IntLayer | Tensor]]:
    """What a block of a packed model holds, by name in the block, in the order of its modules.

    Of quantised layers `self_attn.q_proj` an `IntLayer`; every other tensor as it is stored, `self_attn.q_proj.bias`,
    say.
    """
    assert model.packed is not None
    prefix = f"{model.family.blocks}.{index}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in model.read_block(index).items()}
    empty = model.empty_block(index)
    for name in model.packed.linears:
        scheme = model.packed.schemes.of(index, name)
        if scheme.quantised:
            own = ("codes", "scale", "zero", "left", "right")
            stored = {key: tensors.pop(f"{name}.{key}") for key in own if f"{name}.{key}" in tensors}
            columns = empty.get_submodule(name).in_features
            assert isinstance(columns, int)
            yield name, int_layer(stored, columns, scheme)
    yield from tensors.items()

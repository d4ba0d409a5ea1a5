"""Which type of GGML block holds a format of weights, and a layer in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as Ggml
from jaxtyping import UInt8
from numpy import ndarray as Array
from torch import Tensor

from ptql.export import ggml_blocks as blocks
from ptql.export.layers import IntLayer
from ptql.recipe import IntScheme

# axes: out = weight rows; b = bytes of a row; g = groups of columns that share a scale


@dataclass(frozen=True)
class BlockType:
    """A type of GGML tensors.

    Args:
        ggml: Its number and name in a file.
        columns: Of a block.
        encode: From codes, scales and zero points, block by block, to bytes.
    """

    ggml: Ggml
    columns: int
    encode: Callable[[blocks.Codes, blocks.Scale, blocks.Zero], blocks.Blocks]

    @property
    def has_minimum(self) -> bool:
        """Whether zero points become a rounded float16 number."""
        return self.ggml in (Ggml.Q4_1, Ggml.Q5_1)

    def fits(self, scheme: IntScheme, columns: int) -> bool:
        """Whether all columns of each block in a row of `columns` have the same scale."""
        one_scale = scheme.groups(columns) == 1 or scheme.columns(columns) % self.columns == 0
        return one_scale and columns % self.columns == 0

    def rows(self, layer: IntLayer | Tensor) -> UInt8[Array, "out b"]:
        """The bytes of a layer's rows."""
        assert isinstance(layer, IntLayer)
        codes = layer.codes.numpy()
        rows, columns = codes.shape
        group = np.arange(columns // self.columns) * self.columns // layer.columns
        scale, zero = (_per_block(tensor, group) for tensor in (layer.scale, layer.zero))
        return self.encode(codes.reshape(-1, self.columns), scale, zero).reshape(rows, -1)


def _per_block(values: Tensor, group: Array) -> Array:
    return values.numpy()[:, group].reshape(-1)


Q4_0 = BlockType(Ggml.Q4_0, 32, blocks.q4_0)
Q5_0 = BlockType(Ggml.Q5_0, 32, blocks.q5_0)
Q8_0 = BlockType(Ggml.Q8_0, 32, blocks.q8_0)
TYPES: tuple[tuple[int, bool | None, BlockType], ...] = (
    (3, True, BlockType(Ggml.TQ2_0, 256, blocks.tq2_0)),
    (4, None, BlockType(Ggml.Q2_K, 256, blocks.q2_k)),
    (8, True, BlockType(Ggml.Q3_K, 256, blocks.q3_k)),
    (16, True, Q4_0),
    (16, False, BlockType(Ggml.Q4_K, 256, blocks.q4_k)),
    (16, False, BlockType(Ggml.Q4_1, 32, blocks.q4_1)),
    (32, True, Q5_0),
    (32, False, BlockType(Ggml.Q5_K, 256, blocks.q5_k)),
    (32, False, BlockType(Ggml.Q5_1, 32, blocks.q5_1)),
    (64, True, BlockType(Ggml.Q6_K, 256, blocks.q6_k)),
    (256, True, Q8_0),
)
"""Levels, whether symmetric (None: either), and the type; the first that fits is taken, as it is exact or smaller."""
WIDER = ((4, Q4_0), (5, Q5_0), (8, Q8_0))
"""Bits of codes around zero, which hold those of narrower formats, zero point taken off."""


def block_type(scheme: IntScheme, columns: int, widen: bool = False) -> BlockType | None:
    """The type that holds a format in rows of `columns` columns, or None.

    Args:
        scheme: The format.
        columns: Of a row.
        widen: If there is none, take one of wider codes: as exact, but larger.
    """
    if scheme.salient is not None or not scheme.quantised:
        return None
    for levels, symmetric, kind in TYPES:
        if scheme.levels == levels and symmetric in (None, scheme.symmetric) and kind.fits(scheme, columns):
            return kind
    if widen:
        low, high = _span(scheme)
        for bits, kind in WIDER:
            if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1) and kind.fits(scheme, columns):
                return kind
    return None


def _span(scheme: IntScheme) -> tuple[int, int]:
    """The smallest and the largest `code - zero`."""
    top = scheme.levels - 1
    middle = scheme.levels // 2
    return (-middle, top - middle) if scheme.symmetric else (-top, top)


def nearest(scheme: IntScheme, columns: int, widen: bool) -> str:
    """Why no type holds a format, and what would do."""
    what = f"{scheme.levels} levels, group_size {scheme.group_size}, symmetric {str(scheme.symmetric).lower()}"
    if scheme.salient is not None:
        return "signs and salient channels; fit with -c schemes/w2a16g64 or wider, or use --format dense"
    if columns % 32:
        return (
            f"{columns} columns are no multiple of 32; give the layer 16 bits (--model.layers), or use --format dense"
        )
    if scheme.groups(columns) > 1 and scheme.columns(columns) % 32:
        return f"{what}: a block of 32 columns has one scale; fit with a group_size of 32, a multiple of it, or -1"
    wider = "" if widen or block_type(scheme, columns, True) is None else ", or use --widen true: as exact, but larger"
    if scheme.levels in (4, 8, 64) and columns % 256 == 0:
        symmetric = "" if scheme.levels == 4 else "symmetric true and "
        return f"{what}: those of {scheme.bits} bits have 256 columns; fit with {symmetric}group_size 256 or -1{wider}"
    bits = 4 if scheme.bits < 4 else 8
    return f"{what}, {columns} columns; fit with {bits} bits, symmetric true and group_size 32{wider}"

"""Blocks of GGML, in which a GGUF file stores matrices, as bytes.

A block is the codes of 32 or 256 neighbouring columns with float16 scales. Layouts: `ggml-common.h` and
`ggml-quants.c` of llama.cpp. Those of 256 columns have a small integer for each 16 or 32 of them that multiplies the
scale; here it is 1, so that a block has one scale. All but those with a minimum hold the float32 weight exactly.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float16, UInt8
from numpy import ndarray as Array

# axes: n = blocks of a matrix, row by row; c = columns of a block; b = bytes of a block
# A block's weight is (code - zero) * scale.

Codes = UInt8[Array, "n c"]
Scale = Float16[Array, " n"]
Zero = UInt8[Array, " n"]
Blocks = UInt8[Array, "n b"]


def q4_0(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * (q - 8): 32 columns, 18 bytes."""
    return np.hstack([_half(scale), _pairs(_centred(codes, zero, 8))])


def q5_0(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * (q - 16): 32 columns, 22 bytes."""
    q = _centred(codes, zero, 16)
    return np.hstack([_half(scale), _fifth_bits(q), _pairs(q)])


def q8_0(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * q, q from -128 to 127: 32 columns, 34 bytes."""
    return np.hstack([_half(scale), _centred(codes, zero, 0)])


def q4_1(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * q + m, m rounded: 32 columns, 20 bytes."""
    return np.hstack([_half(scale), _half(minimum(scale, zero)), _pairs(codes)])


def q5_1(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * q + m, m rounded: 32 columns, 24 bytes."""
    return np.hstack([_half(scale), _half(minimum(scale, zero)), _fifth_bits(codes), _pairs(codes)])


def minimum(scale: Scale, zero: Zero) -> Scale:
    """The weight of code 0, -zero * scale, rounded to float16, infinite where it is beyond 65504.

    All weights of the block are shifted by what the rounding changes: at most 2^-11 of the minimum, which for `bits`
    wide codes is (2^bits - 1) / 2048 of a step: 0.8 % of one with 4 bits, 1.6 % with 5.
    """
    with np.errstate(over="ignore"):
        return (scale.astype(np.float32) * -zero.astype(np.float32)).astype(np.float16)


def q2_k(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * a * q - e * z, a and z of 4 bits for 16 columns: 256 columns, 84 bytes. a = 1, e = d."""
    shared = np.repeat(1 | zero[:, None] << 4, 16, axis=1)
    return np.hstack([shared, _quarters(codes), _half(scale), _half(scale)])


def q3_k(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * (a - 32) * (q - 4), a of 6 bits for 16 columns: 256 columns, 110 bytes. a = 33."""
    q = _centred(codes, zero, 4)
    high = np.packbits((q >> 2).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    low_of_a, high_of_a = 33 & 15, 33 >> 4
    a = np.array([low_of_a * 0x11] * 8 + [high_of_a * 0x55] * 4, np.uint8)
    return np.hstack([high, _quarters(q & 3), np.tile(a, (len(q), 1)), _half(scale)])


def q4_k(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * a * q - e * z, a and z of 6 bits for 32 columns: 256 columns, 144 bytes. a = 1, e = d."""
    return np.hstack([_half(scale), _half(scale), _sixes(zero), _halves(codes)])


def q5_k(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """As `q4_k`, with a fifth bit: 256 columns, 176 bytes."""
    high = np.packbits((codes >> 4).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    return np.hstack([_half(scale), _half(scale), _sixes(zero), high, _halves(codes)])


def q6_k(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * a * (q - 32), a of 8 bits for 16 columns: 256 columns, 210 bytes. a = 1."""
    q = _centred(codes, zero, 32)
    sides = (q & 15).reshape(-1, 2, 2, 64)
    low = (sides[:, :, 0] | sides[:, :, 1] << 4).reshape(-1, 128)
    return np.hstack([low, _quarters(q >> 4), np.ones((len(q), 16), np.uint8), _half(scale)])


def tq2_0(codes: Codes, scale: Scale, zero: Zero) -> Blocks:
    """w = d * (q - 1), q from 0 to 2: 256 columns, 66 bytes."""
    return np.hstack([_quarters(_centred(codes, zero, 1)), _half(scale)])


def _half(values: Scale) -> UInt8[Array, "n 2"]:
    return values.astype("<f2").reshape(-1, 1).view(np.uint8)


def _centred(codes: Codes, zero: Zero, middle: int) -> Codes:
    """Codes whose zero is `middle`; the bytes of a signed integer where it is 0."""
    return (codes.astype(np.int16) - zero[:, None] + middle).astype(np.uint8)


def _pairs(q: Codes) -> UInt8[Array, "n half"]:
    """The low four bits, columns that are 16 apart in a byte."""
    return (q[:, :16] & 15) | q[:, 16:] << 4


def _halves(q: Codes) -> UInt8[Array, "n half"]:
    """The low four bits, columns that are 32 apart in a byte."""
    sides = (q & 15).reshape(-1, 4, 2, 32)
    return (sides[:, :, 0] | sides[:, :, 1] << 4).reshape(-1, 128)


def _quarters(q: Codes) -> UInt8[Array, "n quarter"]:
    """Two bits, columns that are 32, 64 and 96 apart in a byte."""
    parts = q.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(parts, axis=2).reshape(-1, 64)


def _fifth_bits(q: Codes) -> UInt8[Array, "n 4"]:
    return np.packbits(q >> 4, axis=1, bitorder="little")


def _sixes(zero: Zero) -> UInt8[Array, "n 12"]:
    """Eight times a = 1 and `zero`, 6 bits each, the upper two of the last four of each kind beside the first four."""
    ones = np.ones_like(zero)
    return np.repeat(np.stack([ones, zero | zero >> 4 << 6, 1 | (zero & 15) << 4], axis=1), 4, axis=1)

"""Blocks read back by the `gguf` package, and bit by bit as llama.cpp's `dequantize_row_*` do."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch

from ptql.export.ggml_types import block_type, nearest
from ptql.export.layers import IntLayer
from ptql.functional import affine
from ptql.recipe import IntScheme

EXACT = {
    "Q4_0": (IntScheme(4, 32, True), 96),
    "Q4_0 long groups": (IntScheme(4, 64, True), 160),  # the last group is shorter
    "Q4_0 rows": (IntScheme(4, -1, True), 96),
    "Q4_K": (IntScheme(4, 256, False), 512),
    "Q4_K rows": (IntScheme(4, -1, False), 512),
    "Q5_0": (IntScheme(5, 128, True), 256),
    "Q5_K": (IntScheme(5, -1, False), 512),
    "Q8_0": (IntScheme(8, 32, True), 96),
    "Q2_K": (IntScheme(2, 256, False), 512),
    "Q2_K rows": (IntScheme(2, -1, True), 512),
    "Q3_K": (IntScheme(3, 256, True), 512),
    "Q6_K": (IntScheme(6, -1, True), 256),
    "TQ2_0": (IntScheme(1, 256, True, balanced=True), 512),
}
WIDENED = {
    "Q4_0": (IntScheme(3, 64, False), 128),
    "Q4_0 two bits": (IntScheme(2, 32, False), 96),
    "Q4_0 five levels": (IntScheme(2, 32, True, balanced=True), 96),
    "Q5_0": (IntScheme(5, 32, True), 96),
    "Q8_0": (IntScheme(7, 32, False), 96),
    "Q8_0 six bits": (IntScheme(6, 32, True), 96),
}
SHIFTED = {"Q4_1": (IntScheme(4, 32, False), 96), "Q4_1 rows": (IntScheme(4, -1, False), 96)}
SHIFTED |= {"Q5_1": (IntScheme(5, 64, False), 192)}


def layer(scheme: IntScheme, columns: int, rows: int = 5) -> IntLayer:
    """Every code and zero point is likely."""
    chance = torch.Generator().manual_seed(0)
    shape = (rows, scheme.groups(columns))
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=chance, dtype=torch.uint8)
    zero = torch.randint(0, scheme.levels, shape, generator=chance, dtype=torch.uint8)
    if scheme.symmetric:
        zero = torch.full(shape, affine.symmetric_grid(scheme.levels)[0], dtype=torch.uint8)
    return IntLayer(codes, torch.rand(shape, generator=chance).half() + 0.01, zero, scheme)


def half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def six(a: bytes, j: int) -> tuple[int, int]:
    """`get_scale_min_k4`."""
    if j < 4:
        return a[j] & 63, a[j + 4] & 63
    return (a[j + 4] & 15) | (a[j - 4] >> 6 << 4), (a[j + 4] >> 4) | (a[j] >> 6 << 4)


def q4(b: bytes, at: int, i: int) -> int:
    return b[at + i % 16] >> 4 * (i // 16) & 15


def fifth(b: bytes, at: int, i: int) -> int:
    return (b[at + i // 8] >> i % 8 & 1) << 4


def q2(b: bytes, at: int, i: int) -> int:
    return b[at + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3


def k4(b: bytes, at: int, i: int) -> int:
    return b[at + i // 64 * 32 + i % 32] >> 4 * (i % 64 // 32) & 15


def k_min(b: bytes, i: int, q: int) -> float:
    scale, low = six(b[4:16], i // 32)
    return half(b, 0) * scale * q - half(b, 2) * low


def three(b: bytes, i: int) -> float:
    j = i // 16
    scale = (b[96 + j % 8] >> 4 * (j // 8) & 15) | (b[104 + j % 4] >> 2 * (j // 4) & 3) << 4
    high = b[i % 32] >> i // 32 & 1
    return half(b, 108) * (scale - 32) * (q2(b, 32, i) - (0 if high else 4))


def sixth(b: bytes, i: int) -> float:
    low = b[i // 128 * 64 + i % 64] >> 4 * (i % 128 // 64) & 15
    q = low | (b[128 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3) << 4
    return half(b, 208) * struct.unpack_from("b", b, 192 + i // 16)[0] * (q - 32)


REFERENCE: dict[str, Callable[[bytes, int], float]] = {
    "Q4_0": lambda b, i: half(b, 0) * (q4(b, 2, i) - 8),
    "Q4_1": lambda b, i: half(b, 0) * q4(b, 4, i) + half(b, 2),
    "Q5_0": lambda b, i: half(b, 0) * ((q4(b, 6, i) | fifth(b, 2, i)) - 16),
    "Q5_1": lambda b, i: half(b, 0) * (q4(b, 8, i) | fifth(b, 4, i)) + half(b, 2),
    "Q8_0": lambda b, i: half(b, 0) * struct.unpack_from("b", b, 2 + i)[0],
    "Q2_K": lambda b, i: half(b, 80) * (b[i // 16] & 15) * q2(b, 16, i) - half(b, 82) * (b[i // 16] >> 4),
    "Q3_K": three,
    "Q4_K": lambda b, i: k_min(b, i, k4(b, 16, i)),
    "Q5_K": lambda b, i: k_min(b, i, k4(b, 48, i) | (b[16 + i % 32] >> i // 32 & 1) << 4),
    "Q6_K": sixth,
    "TQ2_0": lambda b, i: half(b, 64) * (q2(b, 0, i) - 1),
}


def slowly(rows: np.ndarray, name: str, columns: int) -> np.ndarray:
    per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    values = []
    for row in rows:
        blocks = [row[k : k + size].tobytes() for k in range(0, len(row), size)]
        values.append([REFERENCE[name](block, i) for block in blocks for i in range(per_block)])
    return np.array(values).reshape(len(rows), columns)


def read_back(scheme: IntScheme, columns: int, name: str, widen: bool) -> tuple[IntLayer, np.ndarray]:
    kind, given = block_type(scheme, columns, widen), layer(scheme, columns)
    assert kind is not None
    assert kind.ggml.name == name.split()[0]
    rows = kind.rows(given)
    found = gguf.quants.dequantize(rows, kind.ggml)
    np.testing.assert_allclose(slowly(rows, kind.ggml.name, columns), found, rtol=1e-6, atol=1e-6)
    return given, found


@pytest.mark.parametrize("name", EXACT)
def test_weights_are_those_that_were_packed(name: str) -> None:
    given, found = read_back(*EXACT[name], name, widen=False)
    np.testing.assert_array_equal(found, given.dense().numpy())


@pytest.mark.parametrize("name", WIDENED)
def test_so_are_those_of_wider_codes(name: str) -> None:
    scheme, columns = WIDENED[name]
    assert (block_type(scheme, columns) is None) == (name != "Q5_0")
    given, found = read_back(scheme, columns, name, widen=True)
    np.testing.assert_array_equal(found, given.dense().numpy())


@pytest.mark.parametrize("name", SHIFTED)
def test_a_rounded_minimum_shifts_weights_by_less_than_was_said(name: str) -> None:
    scheme, columns = SHIFTED[name]
    given, found = read_back(scheme, columns, name, widen=False)
    step = given.scale.float().repeat_interleave(given.columns, 1)[:, :columns].numpy()
    off = np.abs(found - given.dense().numpy()) / step
    assert 0 < off.max() <= (scheme.levels - 1) / 2048 + 1e-5


@pytest.mark.parametrize(
    ("scheme", "columns", "remedy"),
    [
        (IntScheme(4, 32, True), 172, "16 bits"),
        (IntScheme(4, 16, True), 96, "group_size of 32"),
        (IntScheme(3, 256, False), 512, "symmetric true and group_size 256 or -1, or use --widen true"),
        (IntScheme(2, 64, False), 512, "fit with group_size 256 or -1, or use --widen true"),
        (IntScheme(3, -1, True), 96, "fit with 4 bits, symmetric true and group_size 32, or use --widen true"),
        (IntScheme(8, -1, False), 512, "fit with 8 bits, symmetric true and group_size 32$"),
        (IntScheme(1, salient=0.2), 512, "salient channels"),
    ],
)
def test_what_no_type_holds(scheme: IntScheme, columns: int, remedy: str) -> None:
    assert block_type(scheme, columns) is None
    assert re.search(remedy, nearest(scheme, columns, False)), nearest(scheme, columns, False)

"""Streams of codes as 32-bit words, against the package that reads them and a reference that goes bit by bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from ptql.export.words import words

BITS = range(1, 9)
LENGTHS = (1, 7, 31, 32, 33, 96, 101)


def some_codes(bits: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * bits + n)
    return torch.randint(0, 2**bits, (3, n), generator=generator, dtype=torch.uint8)


def slow_words(row: list[int], bits: int) -> list[int]:
    """Bit k of code i is bit (i * bits + k) of the stream; words are signed."""
    found = [0] * -(-len(row) * bits // 32)
    for i, code in enumerate(row):
        for k in range(bits):
            at = i * bits + k
            found[at // 32] |= (code >> k & 1) << at % 32
    return [word - 2**32 if word >= 2**31 else word for word in found]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_words_are_a_dense_little_endian_stream(bits: int, n: int) -> None:
    codes = some_codes(bits, n)
    found = words(codes, bits)
    assert found.dtype == torch.int32
    assert found.tolist() == [slow_words(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_words_are_those_of_compressed_tensors(bits: int, n: int) -> None:
    codes = some_codes(bits, n)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(words(codes, bits), pack_to_int32(signed, bits, packed_dim=1))
    down = words(codes.T.contiguous().T.contiguous(), bits)
    assert torch.equal(down.T, pack_to_int32(signed.T.contiguous(), bits, packed_dim=0))

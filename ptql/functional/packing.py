"""Codes of 1 to 8 bits as a dense bit stream: the one layout in which ptql stores integers.

Each row is a stream of its own, little-endian: element i takes bits [i * bits, (i + 1) * bits), bit k of a
row is bit k % 8 of byte k // 8, and the unused bits of the last byte are zero.

Codes of five levels go in threes: c0 + 5 c1 + 25 c2 is an element of 7 bits, so a code takes 2.33 bits. Codes of three
levels go in fives: c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4 is an element of 8 bits, so a code takes 1.6. A short last element
is filled up with zeros.
"""

# axes: rows = rows of the matrix; n = codes of a row; bytes = ceil(n * bits / 8), or what `stored_bytes` says

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that a row of `n` codes of `bits` bits takes."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: a packed code has 1 to 8 bits; store wider numbers as they are")
    return -(-n * bits // 8)


# Where codes do not straddle bytes, each byte is shifted apart. Otherwise eight codes are exactly `bits` bytes, so both
# directions go through one 64-bit word for every eight codes: as much memory as the codes take, and no step that
# touches single bits.


def pack(codes: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """The bit stream of each row of `codes`, which are below 2^bits.

    Raises:
        ValueError: `bits` is not 1 to 8.
    """
    rows, n = codes.shape
    length = packed_bytes(n, bits)
    if codes.device.type == "cpu" and codes.numel():  # looking would make a GPU wait, for every token of a cache
        assert int(codes.max()) < 2**bits, f"a code needs more than {bits} bits"
    if 8 % bits == 0:
        parts = F.pad(codes, (0, -n % (8 // bits))).view(rows, length, 8 // bits)
        return (parts << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)
    eighths = -(-n // 8)
    by_word = F.pad(codes, (0, eighths * 8 - n)).view(rows, eighths, 8)
    words = torch.zeros(rows, eighths, dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= by_word[..., i].long() << (i * bits)
    stream = codes.new_empty(rows, eighths, bits)
    for j in range(bits):
        stream[..., j] = words >> (8 * j) & 0xFF
    return stream.flatten(1)[:, :length].contiguous()


def unpack(stream: UInt8[Tensor, "rows bytes"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """The first `n` codes of each row of a stream written by `pack`.

    Raises:
        ValueError: `bits` is not 1 to 8, or a row of the stream has not the bytes that `n` codes take.
    """
    rows, length = stream.shape
    if length != packed_bytes(n, bits):
        raise ValueError(
            f"{length} bytes a row: {n} codes of {bits} bits take {packed_bytes(n, bits)}; the file is "
            "damaged or written with another bit width or row length: read it with those"
        )
    if 8 % bits == 0:
        codes = stream[..., None] >> _shifts(bits, stream.device) & (2**bits - 1)
        return codes.flatten(1)[:, :n].contiguous()
    eighths = -(-n // 8)
    by_word = F.pad(stream, (0, eighths * bits - length)).view(rows, eighths, bits)
    words = torch.zeros(rows, eighths, dtype=torch.int64, device=stream.device)
    for j in range(bits):
        words |= by_word[..., j].long() << (8 * j)
    codes = stream.new_empty(rows, eighths, 8)
    for i in range(8):
        codes[..., i] = words >> (i * bits) & (2**bits - 1)
    return codes.flatten(1)[:, :n].contiguous()


WORDS = {3: (5, 8), 5: (3, 7)}
"""Codes that go into one word, and the bits of it, by levels: 3^5 = 243 < 2^8 and 5^3 = 125 < 2^7."""


def stored_bytes(n: int, levels: int) -> int:
    """Bytes that a row of `n` codes below `levels` takes.

    Raises:
        ValueError: `levels` is neither a power of two from 2 to 256 nor 3 or 5.
    """
    if levels not in WORDS:
        return packed_bytes(n, _bits(levels))
    in_word, word_bits = WORDS[levels]
    return packed_bytes(-(-n // in_word), word_bits)


def pack_levels(codes: UInt8[Tensor, "rows n"], levels: int) -> UInt8[Tensor, "rows bytes"]:
    """The stream of each row of `codes`, which are below `levels`; errors as `stored_bytes`."""
    if levels not in WORDS:
        return pack(codes, _bits(levels))
    assert codes.numel() == 0 or int(codes.max()) < levels, f"a code is none of {levels} levels"
    in_word, word_bits = WORDS[levels]
    digits = F.pad(codes, (0, -codes.shape[1] % in_word)).unflatten(1, (-1, in_word)).unbind(2)
    words = torch.zeros_like(digits[0])
    for digit in reversed(digits):
        words = words * levels + digit
    return pack(words, word_bits)


def unpack_levels(stream: UInt8[Tensor, "rows bytes"], levels: int, n: int) -> UInt8[Tensor, "rows n"]:
    """The first `n` codes of each row of a stream written by `pack_levels`; errors as `unpack`."""
    if levels not in WORDS:
        return unpack(stream, _bits(levels), n)
    in_word, word_bits = WORDS[levels]
    words = unpack(stream, word_bits, -(-n // in_word))
    codes = torch.stack([words // levels**i % levels for i in range(in_word)], 2)
    return codes.flatten(1)[:, :n].contiguous()


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where each code of a byte begins."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _bits(levels: int) -> int:
    bits = levels.bit_length() - 1
    if levels != 2**bits or not 1 <= bits <= 8:
        raise ValueError(f"levels={levels}: a stored code has 2^1 to 2^8 levels, or 3 or 5; use such a grid")
    return bits

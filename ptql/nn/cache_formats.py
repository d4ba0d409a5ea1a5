"""How a cache stores keys and values: packed codes, and what decodes them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ptql.functional.static import decode_channels, encode_channels
from ptql.functional.token_codes import decode_tokens, encode_tokens, pack_tokens, unpack_tokens
from ptql.nn.static_rounding import StaticRounding

Stored = tuple[Tensor, ...]
"""What a format stores of tokens; every tensor has batch, heads and units of tokens for its first axes."""


class CacheFormat(ABC):
    """How tokens of one layer's keys, or values, are stored."""

    unit: int = 1
    """Tokens that are stored together; the third axis of what is stored counts units."""

    @abstractmethod
    def encode(self, x: Tensor) -> Stored:
        """What is stored of [batch, heads, tokens, width], whole units of tokens."""

    @abstractmethod
    def decode(self, stored: Stored, width: int) -> Tensor:
        """Float32 [batch, heads, tokens, width]."""


class TokenFormat(CacheFormat):
    """Each token of each head on its own range: codes, a float16 step, an int16 zero point.

    Args:
        bits: Width of a code.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def encode(self, x: Tensor) -> Stored:
        codes, scale, zero = encode_tokens(x, self.bits)
        return pack_tokens(codes, self.bits), scale, zero

    def decode(self, stored: Stored, width: int) -> Tensor:
        codes, scale, zero = stored
        return decode_tokens(unpack_tokens(codes, self.bits, width), scale, zero)


class ChannelFormat(TokenFormat):
    """`TokenFormat` with channels in the place of tokens: each channel of each head on its own range over 64 tokens. Of
    keys a few channels are wide in all tokens.

    Source: KIVI (arXiv 2402.02750) section 3.2, whose groups have 32.

    Args:
        bits: Width of a code.
    """

    unit = 64

    def encode(self, x: Tensor) -> Stored:
        return super().encode(x.unflatten(2, (-1, self.unit)).transpose(3, 4))

    def decode(self, stored: Stored, width: int) -> Tensor:
        return super().decode(stored, self.unit).transpose(3, 4).flatten(2, 3)


class GridFormat(CacheFormat):
    """Each channel on its fixed grid: nothing but codes.

    Args:
        grid: Of the keys or of the values, as the model rounds them.
    """

    def __init__(self, grid: StaticRounding) -> None:
        self._grid, self._bits = grid, grid.site.bits

    def encode(self, x: Tensor) -> Stored:
        return (pack_tokens(encode_channels(x, *self._grid.channels(x.ndim), self._bits), self._bits),)

    def decode(self, stored: Stored, width: int) -> Tensor:
        (codes,) = stored
        return decode_channels(unpack_tokens(codes, self._bits, width), *self._grid.channels(codes.ndim))

"""Keys, or values, of one layer: packed but for the latest."""

# axes of keys and values: [batch, heads, tokens, head size]

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ptql.nn.cache_formats import CacheFormat, Stored


class PackedTokens:
    """The keys, or the values, of one layer: tokens in their packed form, and the latest as they came.

    Args:
        fmt: Of the packed ones; None packs nothing.
        window: How many of the latest tokens stay as they came, and more until they fill a unit of the format.
    """

    def __init__(self, fmt: CacheFormat | None, window: int) -> None:
        self._fmt, self._window = fmt, window
        self._packed: Stored = ()
        self._recent: Tensor | None = None
        self._gone = 0
        """Tokens of the first packed unit that are forgotten."""

    def append(self, x: Tensor) -> Tensor:
        """Store what is new; returns all that is stored, as it can be read back."""
        recent = torch.cat([x] if self._recent is None else [self._recent, x], dim=2)
        if self._fmt is not None:
            older = max(recent.shape[2] - self._window, 0) // self._fmt.unit * self._fmt.unit
            if older:
                new = self._fmt.encode(recent[:, :, :older])
                pairs = zip(self._packed, new, strict=True)
                self._packed = tuple(torch.cat(pair, dim=2) for pair in pairs) if self._packed else new
                recent = recent[:, :, older:].clone()  # not a view, which would keep the packed ones in memory
        self._recent = recent
        return torch.cat([self._unpacked(self._packed).to(x.dtype), recent], dim=2) if self._packed else recent

    def _unpacked(self, packed: Stored) -> Tensor:
        """What packed units stand for, less the tokens that are forgotten."""
        assert self._fmt is not None
        assert self._recent is not None
        return self._fmt.decode(packed, self._recent.shape[-1])[:, :, self._gone :]

    def drop_first(self, tokens: int) -> None:
        """Forget the oldest; a packed unit is kept as long as one of its tokens is."""
        if self._fmt is not None and self._packed:
            of_packed = min(tokens, self._packed_tokens)
            units, self._gone = divmod(self._gone + of_packed, self._fmt.unit)
            if units:
                self._keep_units(slice(units, None))
            tokens -= of_packed
        if tokens and self._recent is not None:
            self._recent = self._recent[:, :, tokens:].clone()

    def drop_last(self, tokens: int) -> None:
        """Forget the latest. What was rounded stays rounded, also where it goes back into the window."""
        assert self._recent is not None
        held, tokens = self._recent.shape[2], min(tokens, self.tokens)
        self._recent, missing = self._recent[:, :, : max(held - tokens, 0)].clone(), tokens - held
        if missing > 0 and self._fmt is not None:
            left = self._packed_tokens - missing
            units = max(self._gone + left, 0) // self._fmt.unit
            cut = self._unpacked(self._packed)[:, :, units * self._fmt.unit - self._gone if units else 0 : left]
            self._recent = cut.to(self._recent.dtype).clone()
            self._keep_units(slice(units))

    def _keep_units(self, which: slice) -> None:
        self._packed = tuple(part[:, :, which].clone() for part in self._packed)
        if not self._packed[0].shape[2]:
            self._packed, self._gone = (), 0

    def change(self, apply: Callable[[Tensor], Tensor]) -> None:
        """Replace each stored tensor: another order of the batch, another device."""
        self._packed = tuple(map(apply, self._packed))
        self._recent = None if self._recent is None else apply(self._recent)

    @property
    def _packed_tokens(self) -> int:
        return self._packed[0].shape[2] * self._fmt.unit - self._gone if self._packed and self._fmt else 0

    @property
    def tokens(self) -> int:
        return self._packed_tokens + (0 if self._recent is None else self._recent.shape[2])

    def tensors(self) -> Iterator[Tensor]:
        """All that is stored."""
        yield from self._packed
        if self._recent is not None:
            yield self._recent

    def bytes_unpacked(self) -> int:
        """What the same tokens would take as they came."""
        if self._recent is None:
            return 0
        batch, heads, _, width = self._recent.shape
        return batch * heads * self.tokens * width * self._recent.element_size()
